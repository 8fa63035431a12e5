//! Tokens of rows, as places of the flattened matrix of logits.

use mlx_rs::{Array, Dtype};

use crate::{error::Result, uploads::integers};

/// The places of `tokens`, `[N, ...]`, among `[N · V]`, flattened. An id must be below `V`.
pub(super) fn places(tokens: &Array, vocabulary: i32) -> Result<Array> {
    let rows = tokens.dim(0);
    let starts = integers((0..rows).map(|row| row * vocabulary).collect());
    let tokens = tokens.as_dtype(Dtype::Int32)?.reshape(&[rows, -1])?;
    Ok(tokens.add(starts.reshape(&[rows, 1])?)?.reshape(&[-1])?)
}
