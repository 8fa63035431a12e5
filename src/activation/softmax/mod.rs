//! Softmax over the last axis.

mod kernel;
mod reference;

pub(crate) use kernel::KERNELS;

use mlx_rs::{
    Array, Dtype,
    ops::{select, softmax_axis},
};

use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    uploads,
};

/// Options of [`softmax`].
#[derive(Debug, Clone)]
pub struct SoftmaxOptions {
    /// What `x` is multiplied by, above 0; the reciprocal of a temperature. Default: 1.
    pub scale: f32,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for SoftmaxOptions {
    fn default() -> Self {
        Self { scale: 1.0, dispatch: Dispatch::Auto }
    }
}

/// Turns each row of `x` into weights that add up to one.
///
/// `y = exp(scale · (x − max(x))) / sum(exp(scale · (x − max(x))))`, with maximum and sum over the last axis, in f32
/// whatever the dtype, rounded once. An element of −∞ has weight zero. A row of nothing but −∞ yields zeros, and no
/// gradient flows from it: that is how a row with everything masked out looks everywhere in this crate. A row with a NaN
/// or +∞ is NaN.
///
/// # Shapes
/// - `x`: `[..., D]`, f32, f16 or bf16
/// - result: the same
///
/// # Errors
/// When `x` has no last axis or an empty one, when it is not floating point, or when `scale` is not finite and above 0.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::activation::{SoftmaxOptions, softmax};
/// use mlx_rs::array;
///
/// let x = array!([[0.0, 2.0_f32.ln(), f32::NEG_INFINITY]]);
/// let y = softmax(&x, SoftmaxOptions::default())?;
/// assert!(y.all_close(array!([[1.0 / 3.0, 2.0 / 3.0, 0.0]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused op, which by itself answers NaN where a row is masked out; finding such rows and clearing
/// them takes three more passes over memory. `Kernel` is one pass, and one more for the gradient; rows of more than 8192
/// elements, or 4096 in f32, are read twice by either. `Auto` takes it on an NVIDIA GPU.
/// `Reference` is plain ops.
///
/// Milakov and Gimelshein, [Online normalizer calculation for softmax](https://arxiv.org/abs/1805.02867), 2018.
pub fn softmax(x: impl AsRef<Array>, options: SoftmaxOptions) -> Result<Array> {
    let problem = Problem::new(x.as_ref(), &options)?;
    match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if problem.x.size() == 0 => Ok(problem.x.clone()),
        Backend::Builtin => builtin(&problem),
        Backend::Kernel => kernel::softmax(&problem),
        Backend::Reference => reference::softmax(problem.x, problem.scale),
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    scale: f32,
}

impl<'a> Problem<'a> {
    fn new(x: &'a Array, options: &SoftmaxOptions) -> Result<Self> {
        let check = Check::op(Self::OP);
        check.floating("x", x)?;
        check.last_axis("x", x)?;
        check.positive("scale", options.scale)?;
        Ok(Self { x, scale: options.scale })
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "softmax";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.x.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Builtin }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => context.obstacle.or_else(|| kernel::refusal(self)),
            _ => None,
        }
    }
}

/// Masked-out rows are made uniform before MLX sees them, for neither their values nor their gradients may be NaN.
fn builtin(problem: &Problem) -> Result<Array> {
    let (x, scale) = (problem.x, problem.scale);
    let zero = uploads::float(0.0).as_dtype(x.dtype())?;
    let (peak, masked_out) = reference::peak(x)?;
    let safe = select(&masked_out, &zero, x)?;
    let scaled = if scale == 1.0 {
        safe
    } else {
        let below_peak = safe.as_dtype(Dtype::Float32)?.subtract(&peak)?;
        below_peak.multiply(uploads::float(scale))?
    };
    let weights = softmax_axis(scaled, -1, true)?.as_dtype(x.dtype())?;
    Ok(select(masked_out, zero, weights)?)
}
