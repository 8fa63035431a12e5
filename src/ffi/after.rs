//! The order of computation where no value demands one.

use mlx_rs::{Array, error::Result};

use super::vector::Vector;

/// The same arrays, for whose sake MLX computes `earlier` first.
///
/// MLX computes a graph in an order of its own, which may hold the intermediate results of many independent parts at
/// once. Parts that each depend on the one before hold those of one. There is a gradient and `compile` works, but
/// neither forward mode nor vectorization.
pub(crate) fn after(
    arrays: impl IntoIterator<Item = impl AsRef<Array>>,
    earlier: impl IntoIterator<Item = impl AsRef<Array>>,
) -> Result<Vec<Array>> {
    let (arrays, earlier) = (Vector::from_arrays(arrays)?, Vector::from_arrays(earlier)?);
    let ordered = Vector::out(|res| {
        // SAFETY: both lists are alive for the whole call; MLX fills the slot of `out`.
        unsafe { mlx_sys::mlx_depends(res, arrays.as_ptr(), earlier.as_ptr()) }
    })?;
    ordered.to_arrays()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use mlx_rs::transforms::grad;

    use super::*;

    #[test]
    fn the_arrays_are_the_same_and_so_is_their_gradient() {
        let earlier = Array::from_slice(&[1.0_f32, 2.0], &[2]);
        let values = [Array::from_f32(3.0), Array::from_f32(4.0)];
        let ordered = after(&values, [&earlier]).unwrap();
        assert_eq!(ordered.iter().map(Array::item_exact::<f32>).collect::<Vec<_>>(), [3.0, 4.0]);
        let square = |x: &Array| after([x], [&earlier]).and_then(|x| x[0].square()).unwrap();
        let slope = grad(square)(&values[0]).unwrap();
        assert_eq!(slope.item_exact::<f32>(), 6.0);
    }
}
