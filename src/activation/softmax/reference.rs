//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::select, stop_gradient};

use crate::{error::Result, uploads};

pub(super) fn softmax(x: &Array, scale: f32) -> Result<Array> {
    let (peak, masked_out) = peak(x)?;
    let below_peak = x.as_dtype(Dtype::Float32)?.subtract(peak)?;
    let powers = below_peak.multiply(uploads::float(scale))?.exp()?;
    let total = select(masked_out, uploads::float(1.0), powers.sum_axis(-1, true)?)?;
    Ok(powers.divide(total)?.as_dtype(x.dtype())?)
}

/// The largest element of each row in f32, and whether it is −∞; zero stands for it then. The result of a softmax does not
/// depend on what is subtracted, so neither does a gradient.
pub(super) fn peak(x: &Array) -> Result<(Array, Array)> {
    let peak = stop_gradient(x)?.max_axis(-1, true)?.as_dtype(Dtype::Float32)?;
    let masked_out = peak.eq(uploads::float(f32::NEG_INFINITY))?;
    let peak = select(&masked_out, uploads::float(0.0), peak)?;
    Ok((peak, masked_out))
}
