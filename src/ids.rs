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
    // Without a sign what is below zero is large.
    let ids = ids.as_dtype(match ids.dtype() {
        Dtype::Int64 | Dtype::Uint64 => Dtype::Uint64,
        _ => Dtype::Uint32,
    })?;
    let known = ids.lt(uploads::unsigned(size.unsigned_abs()))?;
    let safe = select(&known, ids, uploads::unsigned(0))?.as_dtype(Dtype::Uint32)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_any_width_are_known_or_not() -> Result<()> {
        let known = |ids: Array| -> Result<Vec<(bool, u32)>> {
            let (known, safe) = within(&ids, 7)?;
            assert_eq!(safe.dtype(), Dtype::Uint32);
            let known = known.as_slice::<bool>().iter().copied();
            Ok(known.zip(safe.as_slice::<u32>().iter().copied()).collect())
        };
        let expected = [(true, 0), (true, 6), (false, 0), (false, 0)];
        assert_eq!(known(Array::from_slice(&[0_i8, 6, 7, -1], &[4]))?, expected);
        assert_eq!(known(Array::from_slice(&[0_u8, 6, 7, 255], &[4]))?, expected);
        assert_eq!(known(Array::from_slice(&[0_i32, 6, 7, i32::MIN], &[4]))?, expected);
        assert_eq!(known(Array::from_slice(&[0_u32, 6, 7, u32::MAX], &[4]))?, expected);
        // The lower halves of the last would be known.
        assert_eq!(known(Array::from_slice(&[0_i64, 6, -(1 << 32), 1 << 32], &[4]))?, expected);
        assert_eq!(known(Array::from_slice(&[0_u64, 6, 7, 1 << 32], &[4]))?, expected);
        Ok(())
    }
}
