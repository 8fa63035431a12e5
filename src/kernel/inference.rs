//! Calls that nobody will differentiate.

use std::cell::Cell;

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which operations leave out what MLX would need to transform their kernels: gradients, derivatives in
/// forward mode and vectorization. A call's graph has fewer nodes then, to build and to hand over, and
/// [`selective_scan`](crate::scan::selective_scan) writes hardly any states for a gradient.
///
/// What `f` returns must not depend on an array that is being differentiated or vectorized; MLX says that it cannot
/// transform a custom kernel otherwise. On a CPU, where there are no kernels, nothing changes.
///
/// # Example
/// ```
/// use mlx_primitives::{kernel::inference, scan::{ScanOptions, affine_scan}};
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 4, 2])?;
/// let y = inference(|| affine_scan(&x, &x, ScanOptions { axis: 1, ..Default::default() }))?;
/// assert_eq!(y.as_slice::<f32>(), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn inference<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope(ON.replace(true));
    f()
}

/// Whether the current call is in such a scope.
pub(crate) fn is_on() -> bool {
    ON.get()
}

/// What was before, put back also where `f` panics.
struct Scope(bool);

impl Drop for Scope {
    fn drop(&mut self) {
        ON.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn it_lasts_as_long_as_the_call() {
        assert!(!is_on());
        inference(|| {
            inference(|| assert!(is_on()));
            assert!(is_on());
        });
        let burnt = catch_unwind(AssertUnwindSafe(|| inference(panic_any)));
        assert!(burnt.is_err() && !is_on());
    }

    #[allow(clippy::panic, reason = "that it panics is the point")]
    fn panic_any() {
        panic!("burnt");
    }
}
