//! Scans `h = a · h + x`.

use mlx_rs::Array;

use super::{options::ScanOptions, problem::Problem};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatched},
    error::Result,
};

/// Runs a diagonal linear recurrence along an axis: `h_t = a_t · h_{t−1} + x_t`.
///
/// `h_{−1}` is [`ScanOptions::initial_state`], or zero. With `exclusive` the result is `h_{t−1}`, with `reverse`
/// `h_t = a_t · h_{t+1} + x_t`. It is computed in f32 and rounded to the dtype of `x` when it is written, whatever that of `a`.
/// Nothing is divided by a product of decays, so zeros and long axes are safe. Where decays beyond 1 overflow f32 together, NaN
/// may stand for infinity, and in the reference also for what such decays leave of a state of zero.
///
/// # Shapes
/// - `a`: broadcastable to the shape of `x`: f32, f16, bf16 or complex64
/// - `x`: any of one axis or more, any of those dtypes; a sequence is mostly `[B, L, D]` here, scanned along axis 1
/// - result: the shape and dtype of `x`; complex64 where `a` is
///
/// # Errors
/// When `a` does not broadcast to `x`, when either is neither floating point nor complex, when `x` has no such axis, when
/// an option does not have the shape, dtype or range that [`ScanOptions`] gives it, or when the one backend that
/// `dispatch` allows cannot take the problem.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{ScanOptions, affine_scan};
/// use mlx_rs::array;
///
/// let x = array!([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]);
/// let options = ScanOptions { axis: 0, ..Default::default() };
/// let h = affine_scan(array!([0.5, 1.0]), x, options)?;
/// assert_eq!(h.as_slice::<f32>(), [1.0, 1.0, 2.5, 2.0, 4.25, 3.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// MLX has no such scan, so there is no `Builtin`. `Kernel` reads and writes memory once, forward and back, along any axis and
/// with segments, and reads twice where there are few rows of more than 1024 elements, which it cuts into pieces; it takes no
/// complex numbers. `Reference` steps through time on whole rows, or, where those are short, through chunks of it side by side.
/// `Auto` takes the kernel for large arrays where it was measured to win, and never for axes shorter than
/// [`Settings::min_seq_for_metal`](crate::config::Settings::min_seq_for_metal).
///
/// Martin and Cundy, [Parallelizing Linear Recurrent Neural Nets Over Sequence
/// Length](https://arxiv.org/abs/1709.04057), 2017.
pub fn affine_scan(
    a: impl AsRef<Array>,
    x: impl AsRef<Array>,
    options: ScanOptions<'_>,
) -> Result<Array> {
    Ok(affine_scan_with_state(a, x, options)?.0)
}

/// [`affine_scan`], and the state after the last element, from which a scan of what follows begins.
///
/// # Shapes
/// Those of [`affine_scan`], and
/// - state: f32, or complex64 where the result is, of the shape of [`ScanOptions::initial_state`]: that of `x` without the
///   axis, or with one element for each segment along it. An empty axis or segment leaves its initial state.
///
/// # Errors
/// Those of [`affine_scan`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{ScanOptions, affine_scan_with_state};
/// use mlx_rs::array;
///
/// let (h, last) = affine_scan_with_state(array!(0.5), array!([4.0, 1.0]), ScanOptions::default())?;
/// assert_eq!((h.as_slice::<f32>(), last.as_slice::<f32>()), (&[4.0, 3.0][..], &[3.0][..]));
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn affine_scan_with_state(
    a: impl AsRef<Array>,
    x: impl AsRef<Array>,
    options: ScanOptions<'_>,
) -> Result<(Array, Array)> {
    let problem = Problem::affine(Check::op(Scan::OP), a.as_ref(), x.as_ref(), &options)?;
    let scan = Scan(problem);
    scan.0.run(options.dispatch.resolve(&scan)?)
}

struct Scan(Problem);

impl Dispatched for Scan {
    const OP: &'static str = "affine_scan";

    fn choose(&self, context: &Context) -> Backend {
        self.0.choose(context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        self.0.refusal(backend, context)
    }
}
