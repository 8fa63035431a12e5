//! The definition, in plain MLX ops.

use mlx_rs::{
    Array, Dtype,
    ops::{matmul, rsqrt},
};

use super::Scaling;
use crate::{error::Result, uploads};

pub(super) fn rms_norm_linear(
    x: &Array,
    norm_weight: &Array,
    weight: &Array,
    bias: Option<&Array>,
    scaling: Scaling,
) -> Result<Array> {
    let wide = x.as_dtype(Dtype::Float32)?;
    let mean_square = wide.square()?.mean_axis(-1, true)?;
    let normed = wide.multiply(rsqrt(mean_square.add(uploads::float(scaling.eps))?)?)?;
    let normed = normed.multiply(scaling.factor(norm_weight)?.as_dtype(Dtype::Float32)?)?;
    let y = matmul(normed, weight.as_dtype(Dtype::Float32)?.t())?;
    let y = match bias {
        Some(bias) => y.add(bias.as_dtype(Dtype::Float32)?)?,
        None => y,
    };
    Ok(y.as_dtype(x.dtype())?)
}
