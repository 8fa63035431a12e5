//! Log-probabilities beside the tokens drawn.

use mlx_rs::{
    Array, Dtype,
    ops::{
        concatenate,
        indexing::{argmax_axis, take_along_axis},
        select,
    },
};

use crate::{error::Result, uploads};

/// Which distribution reported log-probabilities are those of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum LogProbabilities {
    /// The model's: the logits as they came.
    #[default]
    Raw,
    /// That which the token was drawn from, after all steps; a greedy row's token has 0, and one of a row
    /// with a NaN among its logits NaN.
    Processed,
}

/// The most likely tokens of each row, the likeliest first, and of equals the lowest id.
#[derive(Debug, Clone)]
pub struct TopLogProbabilities {
    /// `[N, top]`, u32.
    pub tokens: Array,
    /// `[N, top]`, f32.
    pub log_probabilities: Array,
}

/// The `count` largest of each row of log-probabilities, `[N, V]`, in as many passes: there are few.
pub(super) fn top(log_probabilities: &Array, count: i32) -> Result<TopLogProbabilities> {
    let places = Array::arange::<_, u32>(0, log_probabilities.dim(-1), None)?;
    let taken = uploads::float(f32::NEG_INFINITY);
    let mut left = log_probabilities.nan_to_num(f32::MIN, f32::INFINITY, f32::MIN)?;
    let mut tokens = Vec::new();
    for _ in 0..count {
        let token = argmax_axis(&left, -1, true)?;
        left = select(places.eq(&token)?, &taken, left)?;
        tokens.push(token);
    }
    let tokens = concatenate(&tokens, -1)?.as_dtype(Dtype::Uint32)?;
    let log_probabilities = take_along_axis(log_probabilities, &tokens, -1)?;
    Ok(TopLogProbabilities { tokens, log_probabilities })
}
