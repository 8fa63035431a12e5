//! What a cache hides, on top of what the caller does.

use mlx_rs::{Array, Dtype, ops::select};

use crate::{error::Result, uploads};

/// Both: where either hides a key, it is hidden. `own` is boolean.
pub(super) fn both(own: Option<Array>, asked: Option<Array>) -> Result<Option<Array>> {
    Ok(match (own, asked) {
        (Some(own), Some(asked)) if asked.dtype() == Dtype::Bool => Some(own.logical_and(asked)?),
        (Some(own), Some(asked)) => {
            let hidden = uploads::float(f32::NEG_INFINITY).as_dtype(asked.dtype())?;
            Some(select(own, asked, hidden)?)
        }
        (own, asked) => own.or(asked),
    })
}

/// The columns of these positions of a mask over all positions.
pub(super) fn columns(mask: &Array, positions: &[i32]) -> Result<Array> {
    let one_for_all = mask.shape().last().is_none_or(|&columns| columns == 1);
    if one_for_all {
        return Ok(mask.clone());
    }
    Ok(mask.take_axis(uploads::integers(positions.to_vec()), -1)?)
}
