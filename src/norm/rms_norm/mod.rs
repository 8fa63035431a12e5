//! Root-mean-square normalization.

pub(super) mod kernel;
mod module;
pub(super) mod reference;

pub(crate) use kernel::KERNELS;
pub use module::{RmsNorm, RmsNormBuilder};

use mlx_rs::{Array, Dtype};

use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    kernel::Rows,
    uploads,
};

/// Options of [`rms_norm`].
#[derive(Debug, Clone)]
pub struct RmsNormOptions {
    /// Added to the mean square, so that a row of zeros stays finite. Default: 1e-5.
    pub eps: f32,
    /// Whether rows are scaled by `1 + weight`, as in Gemma, and not by `weight`. Default: no.
    pub unit_offset: bool,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl RmsNormOptions {
    /// The default of [`RmsNormOptions::eps`].
    pub const DEFAULT_EPS: f32 = 1e-5;
}

impl Default for RmsNormOptions {
    fn default() -> Self {
        Self { eps: Self::DEFAULT_EPS, unit_offset: false, dispatch: Dispatch::Auto }
    }
}

/// Scales each row of `x` to a root mean square of one, then by `weight`.
///
/// `y = x / sqrt(mean(x²) + eps) · weight`, or `· (1 + weight)` with
/// [`RmsNormOptions::unit_offset`], with the mean over the last axis, in f32 whatever the dtype.
///
/// # Shapes
/// - `x`: `[..., D]`, f32, f16 or bf16
/// - `weight`: `[D]`, any of those; without one, nothing is scaled
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `weight` is not `[D]`, when either is not
/// floating point, or when `eps` is negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{RmsNormOptions, rms_norm};
/// use mlx_rs::array;
///
/// let x = array!([[3.0, 4.0]]);
/// let y = rms_norm(&x, &array!([1.0, 2.0]), RmsNormOptions { eps: 0.0, ..Default::default() })?;
/// assert!(y.all_close(array!([[0.848_528, 2.262_742]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused op, and what `Auto` takes. `Kernel` does as much in one pass over memory, and its gradient
/// in another. `Reference` is plain ops. A `weight` of a wider dtype than `x` makes the fused op convert `x` and the
/// result back: load weights in the dtype you compute in.
///
/// Zhang and Sennrich, [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), 2019.
pub fn rms_norm<'a>(
    x: impl AsRef<Array>,
    weight: impl Into<Option<&'a Array>>,
    options: RmsNormOptions,
) -> Result<Array> {
    let problem = Problem::new(x.as_ref(), weight.into(), &options)?;
    match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if problem.x.size() == 0 => Ok(problem.x.clone()),
        Backend::Builtin => builtin(&problem),
        Backend::Kernel => kernel::rms_norm(&problem),
        Backend::Reference => reference::rms_norm(problem.x, problem.weight, problem.scaling),
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    weight: Option<&'a Array>,
    scaling: Scaling,
    dtype: Dtype,
}

/// How rows are scaled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scaling {
    pub(crate) eps: f32,
    pub(crate) unit_offset: bool,
}

impl Scaling {
    pub(super) fn of(options: &RmsNormOptions) -> Self {
        Self { eps: options.eps, unit_offset: options.unit_offset }
    }

    /// What normalized rows are multiplied by. An offset is added in f32, where small weights
    /// keep their digits beside it.
    pub(super) fn factor(self, weight: &Array) -> Result<Array> {
        if self.unit_offset {
            Ok(weight.as_dtype(Dtype::Float32)?.add(uploads::float(1.0))?)
        } else {
            Ok(weight.clone())
        }
    }
}

impl<'a> Problem<'a> {
    fn new(x: &'a Array, weight: Option<&'a Array>, options: &RmsNormOptions) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("x", x)?;
        let dims = check.last_axis("x", x)?;
        if let Some(weight) = weight {
            check.floating("weight", weight)?;
            check.shape("weight", weight, axes![dims])?;
        }
        check.non_negative("eps", options.eps)?;
        Ok(Self { x, weight, scaling: Scaling::of(options), dtype })
    }

    fn factor(&self) -> Result<Option<Array>> {
        self.weight.map(|weight| self.scaling.factor(weight)).transpose()
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "rms_norm";

    fn choose(&self, _: &Context) -> Backend {
        Backend::Builtin
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => context.obstacle.or_else(|| Rows::refusal(self.x)),
            _ => None,
        }
    }
}

fn builtin(problem: &Problem) -> Result<Array> {
    let y = mlx_rs::fast::rms_norm(problem.x, problem.factor()?.as_ref(), problem.scaling.eps)?;
    Ok(y.as_dtype(problem.dtype)?)
}
