//! The definition, in plain MLX ops.

use mlx_rs::Array;

use super::Scaling;
use crate::{error::Result, norm::rms_norm::reference::rms_norm};

pub(super) fn add_rms_norm(
    x: &Array,
    residual: &Array,
    weight: &Array,
    scaling: Scaling,
) -> Result<[Array; 2]> {
    let sum = x.add(residual)?;
    Ok([rms_norm(&sum, Some(weight), scaling)?, sum])
}
