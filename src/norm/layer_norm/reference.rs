//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use crate::{error::Result, uploads};

pub(in crate::norm) fn layer_norm(
    x: &Array,
    weight: Option<&Array>,
    bias: Option<&Array>,
    eps: f32,
) -> Result<Array> {
    let wide = x.as_dtype(Dtype::Float32)?;
    // The variance of the centered row: mean(x²) - mean(x)² would cancel where the mean is large.
    let centered = wide.subtract(wide.mean_axis(-1, true)?)?;
    let variance = centered.square()?.mean_axis(-1, true)?;
    let mut y = centered.multiply(rsqrt(variance.add(uploads::float(eps))?)?)?;
    if let Some(weight) = weight {
        y = y.multiply(weight.as_dtype(Dtype::Float32)?)?;
    }
    if let Some(bias) = bias {
        y = y.add(bias.as_dtype(Dtype::Float32)?)?;
    }
    Ok(y.as_dtype(x.dtype())?)
}
