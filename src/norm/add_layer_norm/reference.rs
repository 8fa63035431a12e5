//! The definition, in plain MLX ops.

use mlx_rs::Array;

use crate::{error::Result, norm::layer_norm::reference::layer_norm};

pub(super) fn add_layer_norm(
    x: &Array,
    residual: &Array,
    weight: Option<&Array>,
    bias: Option<&Array>,
    eps: f32,
) -> Result<[Array; 2]> {
    let sum = x.add(residual)?;
    Ok([layer_norm(&sum, weight, bias, eps)?, sum])
}
