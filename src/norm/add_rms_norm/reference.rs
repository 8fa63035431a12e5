//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use super::Scaling;
use crate::error::Result;

pub(super) fn add_rms_norm(
    x: &Array,
    residual: &Array,
    weight: &Array,
    scaling: Scaling,
) -> Result<[Array; 2]> {
    let sum = x.add(residual)?;
    let wide = sum.as_dtype(Dtype::Float32)?;
    let mean_square = wide.square()?.mean_axis(-1, true)?;
    let normed = wide.multiply(rsqrt(mean_square.add(Array::from_f32(scaling.eps))?)?)?;
    let y = normed.multiply(scaling.factor(weight)?.as_dtype(Dtype::Float32)?)?;
    Ok([y.as_dtype(sum.dtype())?, sum])
}
