//! Ids that arrive in arrays, where no call can refuse one without reading it.

use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{broadcast_to, select},
};

use crate::uploads;

/// Splits `ids` into which of them are in `0..size` and indices that are safe to gather with: the
/// ids themselves, and 0 for the rest. MLX would read past the end, or count from it.
pub(crate) fn within(ids: &Array, size: i32) -> Result<(Array, Array)> {
    let ids = ids.as_dtype(Dtype::Int64)?;
    let zero = uploads::int(0);
    let known = ids.ge(&zero)?.logical_and(ids.lt(uploads::int(size))?)?;
    let safe = select(&known, ids, zero)?.as_dtype(Dtype::Uint32)?;
    Ok((known, safe))
}

/// The rows `ids`, `[...]`, of `table`, `[V, D]`, as `[..., D]`; an id that names no row gives NaN.
pub(crate) fn rows(table: &Array, ids: &Array) -> Result<Array> {
    let shape = [ids.shape(), &[table.dim(1)]].concat();
    let nan = uploads::float(f32::NAN).as_dtype(table.dtype())?;
    if ids.size() == 0 || table.size() == 0 {
        return broadcast_to(nan, &shape);
    }
    let (known, safe) = within(ids, table.dim(0))?;
    select(known.expand_dims(-1)?, table.take_axis(safe, 0)?, nan)
}
