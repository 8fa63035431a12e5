//! Ids that arrive in arrays, where no call can refuse one without reading it.

use mlx_rs::{Array, Dtype, error::Result, ops::select};

/// Splits `ids` into which of them are in `0..size` and indices that are safe to gather with: the
/// ids themselves, and 0 for the rest. MLX would read past the end, or count from it.
pub(crate) fn within(ids: &Array, size: i32) -> Result<(Array, Array)> {
    let ids = ids.as_dtype(Dtype::Int64)?;
    let zero = Array::from_int(0);
    let known = ids.ge(&zero)?.logical_and(ids.lt(Array::from_int(size))?)?;
    let safe = select(&known, ids, zero)?.as_dtype(Dtype::Uint32)?;
    Ok((known, safe))
}
