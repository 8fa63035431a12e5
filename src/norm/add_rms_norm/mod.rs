//! Residual addition and root-mean-square normalization in one.

mod kernel;
mod reference;

pub(crate) use kernel::KERNELS;

use mlx_rs::Array;

use super::rms_norm::{RmsNormOptions, Scaling};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatched},
    error::Result,
    kernel::Rows,
};

/// Adds `residual` to `x` and scales each row of the sum as [`rms_norm`](super::rms_norm()) does: returns the
/// normalized rows and the sum, which is the next residual.
///
/// `s = x + residual`, `y = s / sqrt(mean(s²) + eps) · weight`, or `· (1 + weight)` with
/// [`RmsNormOptions::unit_offset`]; the mean is over the last axis and in f32 whatever the dtype.
///
/// # Shapes
/// - `x`, `residual`: `[..., D]`, of one shape and dtype: f32, f16 or bf16
/// - `weight`: `[D]`, any of those
/// - results: `y` and `s`, both of the shape and dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `residual` differs from `x` in shape or dtype, when `weight` is not
/// `[D]`, when any is not floating point, or when `eps` is negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{RmsNormOptions, add_rms_norm};
/// use mlx_rs::array;
///
/// let (x, residual) = (array!([[1.0, 2.0]]), array!([[2.0, 2.0]]));
/// let options = RmsNormOptions { eps: 0.0, ..Default::default() };
/// let (y, sum) = add_rms_norm(&x, &residual, &array!([1.0, 2.0]), options)?;
/// assert_eq!(sum.as_slice::<f32>(), [3.0, 4.0]);
/// assert!(y.all_close(array!([[0.848_528, 2.262_742]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` adds and calls MLX's fused norm. `Kernel` does both in one pass over memory; its gradient is that of MLX's norm, and
/// an addition. `Auto` takes it for large arrays on an NVIDIA GPU. `Reference` is plain ops.
pub fn add_rms_norm(
    x: impl AsRef<Array>,
    residual: impl AsRef<Array>,
    weight: impl AsRef<Array>,
    options: RmsNormOptions,
) -> Result<(Array, Array)> {
    let (x, residual, weight) = (x.as_ref(), residual.as_ref(), weight.as_ref());
    let problem = Problem::new(x, residual, weight, &options)?;
    let [y, sum] = match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if x.size() == 0 => [x.clone(), x.clone()],
        Backend::Builtin => builtin(&problem)?,
        Backend::Kernel => kernel::add_rms_norm(&problem)?,
        Backend::Reference => reference::add_rms_norm(x, residual, weight, problem.scaling)?,
    };
    Ok((y, sum))
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    residual: &'a Array,
    weight: &'a Array,
    scaling: Scaling,
}

impl<'a> Problem<'a> {
    fn new(
        x: &'a Array,
        residual: &'a Array,
        weight: &'a Array,
        options: &RmsNormOptions,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("x", x)?;
        let dims = check.last_axis("x", x)?;
        check.same_shape("residual", residual, x)?;
        check.dtype_among("residual", residual, &[dtype])?;
        check.floating("weight", weight)?;
        check.shape("weight", weight, axes![dims])?;
        check.non_negative("eps", options.eps)?;
        Ok(Self { x, residual, weight, scaling: Scaling::of(options) })
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "add_rms_norm";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.x.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Builtin }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => context.obstacle.or_else(|| Rows::refusal(self.x)),
            _ => None,
        }
    }
}

fn builtin(problem: &Problem) -> Result<[Array; 2]> {
    let sum = problem.x.add(problem.residual)?;
    let weight = problem.scaling.factor(problem.weight)?;
    let y = mlx_rs::fast::rms_norm(&sum, Some(&weight), problem.scaling.eps)?;
    Ok([y.as_dtype(sum.dtype())?, sum])
}
