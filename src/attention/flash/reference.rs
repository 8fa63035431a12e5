//! The definition, in plain MLX ops.

use mlx_rs::{
    Array, Dtype,
    ops::{select, softmax_axis},
};

use super::{
    Operands,
    mask::{self, Visible},
};
use crate::error::Result;

pub(super) fn attend(operands: &Operands) -> Result<Array> {
    let queries = operands.queries.as_dtype(Dtype::Float32)?;
    let keys = operands.keys.as_dtype(Dtype::Float32)?;
    let values = operands.values.as_dtype(Dtype::Float32)?;

    let products = by_group(&queries, &keys.swap_axes(-1, -2)?)?;
    let scores = masked(&products.multiply(Array::from_f32(operands.scale))?, &operands.visible)?;
    let weights = softmax_axis(scores, -1, true)?;
    let attended = by_group(&weights, &values)?;
    let attended = operands.visible.clear_hidden_rows(attended)?;
    Ok(attended.as_dtype(operands.queries.dtype())?)
}

/// Multiplies each head of `[B, H, ...]` by its group's matrix in `[B, H_kv, ...]`.
fn by_group(heads: &Array, groups: &Array) -> Result<Array> {
    let (shape, count) = (heads.shape(), groups.shape()[1]);
    let grouped = heads.reshape(&[shape[0], count, shape[1] / count, shape[2], shape[3]])?;
    Ok(grouped.matmul(groups.expand_dims(2)?)?.flatten(1, 2)?)
}

fn masked(scores: &Array, visible: &Visible) -> Result<Array> {
    let show = |mask: &Array| select(mask, scores, Array::from_f32(f32::NEG_INFINITY));
    match visible {
        Visible::All => Ok(scores.clone()),
        Visible::Causal => Ok(show(&mask::causal(scores.shape()[2], scores.shape()[3])?)?),
        Visible::Masked(mask) if mask.safe().dtype() == Dtype::Bool => Ok(show(mask.safe())?),
        Visible::Masked(mask) => Ok(scores.add(mask.safe())?),
    }
}
