//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use super::Problem;
use crate::error::Result;

pub(super) fn rms_norm(problem: &Problem) -> Result<Array> {
    let x = problem.x.as_dtype(Dtype::Float32)?;
    let mean_square = x.square()?.mean_axis(-1, true)?;
    let normed = x.multiply(rsqrt(mean_square.add(Array::from_f32(problem.scaling.eps))?)?)?;
    let scaled = match problem.factor()? {
        Some(factor) => normed.multiply(factor.as_dtype(Dtype::Float32)?)?,
        None => normed,
    };
    Ok(scaled.as_dtype(problem.dtype)?)
}
