//! Scans by one operator, affine scans, and scans by any function.

mod affine;
mod builtin;
mod chunked;
mod frame;
mod generic;
mod gradient;
mod kernel;
mod options;
mod problem;
mod reference;
mod rule;
pub(super) mod segments;

pub(crate) use kernel::KERNELS;

pub use affine::{affine_scan, affine_scan_with_state};
pub use generic::{GenericScanOptions, generic_scan};
pub use options::{ScanOperator, ScanOptions};

use mlx_rs::Array;

use self::problem::{Inputs, Mode, Problem};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatched},
    error::Result,
};

/// Combines each element of an axis with all before it: sums, products, maxima, minima, sums of exponentials.
///
/// `y_t = s ∘ x_0 ∘ … ∘ x_t`, with [`ScanOptions::initial_state`] as `s` if there is one;
/// [`ScanOptions`] says what else may be asked. Results are computed in f32 and rounded to the dtype of `x`. What NaN makes
/// of a maximum or minimum is not defined.
///
/// # Shapes
/// - `x`: any of one axis or more, f32, f16 or bf16
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When `x` is not floating point or has no such axis, or when an option does not have the shape, dtype or range that
/// [`ScanOptions`] gives it, or when the one backend that `dispatch` allows cannot take the problem.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{ScanOperator, ScanOptions, associative_scan};
/// use mlx_rs::array;
///
/// let x = array!([1.0, 2.0, 3.0, 4.0]);
/// let options = ScanOptions { segments: Some(&[0, 3, 4]), ..Default::default() };
/// let y = associative_scan(&x, ScanOperator::Add, options)?;
/// assert_eq!(y.as_slice::<f32>(), [1.0, 3.0, 6.0, 4.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's own scan, in f32, and knows no segments. `Kernel` reads and writes memory once, along any axis and with
/// segments, and reads twice where there are few rows of more than 1024 elements, which it cuts into pieces. It has a gradient
/// of its own for sums; others have that of `Reference`, which scans chunks side by side, and is what `Auto`
/// takes for segments where no kernel was measured to win.
///
/// Blelloch, [Prefix Sums and Their Applications](https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf), 1990.
pub fn associative_scan(
    x: impl AsRef<Array>,
    operator: ScanOperator,
    options: ScanOptions<'_>,
) -> Result<Array> {
    Ok(associative_scan_with_state(x, operator, options)?.0)
}

/// [`associative_scan`], and all elements combined: the state that a scan of what follows begins with.
///
/// # Shapes
/// Those of [`associative_scan`], and
/// - state: f32, of the shape of [`ScanOptions::initial_state`]: that of `x` without the axis, or with one element for each
///   segment along it. An empty axis or segment leaves its initial state, or what changes nothing.
///
/// # Errors
/// Those of [`associative_scan`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{ScanOperator, ScanOptions, associative_scan_with_state};
/// use mlx_rs::array;
///
/// let options = ScanOptions::default();
/// let (_, sum) = associative_scan_with_state(array!([1.0, 2.0]), ScanOperator::Add, options)?;
/// let options = ScanOptions { initial_state: Some(&sum), ..options };
/// let (y, _) = associative_scan_with_state(array!([3.0, 4.0]), ScanOperator::Add, options)?;
/// assert_eq!(y.as_slice::<f32>(), [6.0, 10.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn associative_scan_with_state(
    x: impl AsRef<Array>,
    operator: ScanOperator,
    options: ScanOptions<'_>,
) -> Result<(Array, Array)> {
    let problem = Problem::of_operator(Check::op(Scan::OP), x.as_ref(), operator, &options)?;
    let scan = Scan(problem);
    scan.0.run(options.dispatch.resolve(&scan)?)
}

struct Scan(Problem);

impl Dispatched for Scan {
    const OP: &'static str = "associative_scan";

    fn choose(&self, context: &Context) -> Backend {
        self.0.choose(context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        self.0.refusal(backend, context)
    }
}
