//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use super::Scaling;
use crate::{error::Result, uploads};

pub(in crate::norm) fn rms_norm(
    x: &Array,
    weight: Option<&Array>,
    scaling: Scaling,
) -> Result<Array> {
    let wide = x.as_dtype(Dtype::Float32)?;
    let mean_square = wide.square()?.mean_axis(-1, true)?;
    let normed = wide.multiply(rsqrt(mean_square.add(uploads::float(scaling.eps))?)?)?;
    let scaled = match weight {
        Some(weight) => normed.multiply(scaling.factor(weight)?.as_dtype(Dtype::Float32)?)?,
        None => normed,
    };
    Ok(scaled.as_dtype(x.dtype())?)
}
