//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use super::Problem;
use crate::error::Result;

pub(super) fn layer_norm(problem: &Problem) -> Result<Array> {
    let x = problem.x.as_dtype(Dtype::Float32)?;
    // The variance of the centered row: mean(x²) - mean(x)² would cancel where the mean is large.
    let centered = x.subtract(x.mean_axis(-1, true)?)?;
    let variance = centered.square()?.mean_axis(-1, true)?;
    let mut y = centered.multiply(rsqrt(variance.add(Array::from_f32(problem.eps))?)?)?;
    if let Some(weight) = problem.weight {
        y = y.multiply(weight.as_dtype(Dtype::Float32)?)?;
    }
    if let Some(bias) = problem.bias {
        y = y.add(bias.as_dtype(Dtype::Float32)?)?;
    }
    Ok(y.as_dtype(problem.dtype)?)
}
