//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype, ops::rsqrt};

use super::{GateOrder, Norm, silu};
use crate::{error::Result, uploads};

pub(super) fn gated_rms_norm(x: &Array, gate: &Array, weight: &Array, norm: Norm) -> Result<Array> {
    let (wide, gate) = (x.as_dtype(Dtype::Float32)?, silu(gate)?);
    let y = match norm.order {
        GateOrder::GateThenNorm => normalize(&wide.multiply(gate)?, weight, norm)?,
        GateOrder::NormThenGate => normalize(&wide, weight, norm)?.multiply(gate)?,
    };
    Ok(y.as_dtype(x.dtype())?)
}

fn normalize(x: &Array, weight: &Array, norm: Norm) -> Result<Array> {
    let grouped = norm.split(x)?;
    let mean_square = grouped.square()?.mean_axis(-1, true)?;
    let scale = rsqrt(mean_square.add(uploads::float(norm.eps))?)?;
    let normed = grouped.multiply(scale)?.reshape(x.shape())?;
    Ok(normed.multiply(weight.as_dtype(Dtype::Float32)?)?)
}
