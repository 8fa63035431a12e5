//! Root-mean-square normalization and a linear layer in one.

mod kernel;
mod module;
mod reference;

pub(crate) use kernel::KERNELS;
pub use module::{RmsNormLinear, RmsNormLinearBuilder};

use mlx_rs::{
    Array,
    ops::{addmm, matmul, zeros_dtype},
};

use super::rms_norm::{RmsNormOptions, Scaling};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    kernel::refusal,
};

/// Options of [`rms_norm_linear`].
#[derive(Debug, Clone)]
pub struct RmsNormLinearOptions<'a> {
    /// Added to the mean square, so that a row of zeros stays finite. Default: 1e-5.
    pub eps: f32,
    /// Whether normalized rows are scaled by `1 + norm_weight`, as in Gemma, and not by `norm_weight`. Default: no.
    pub unit_offset: bool,
    /// Added to each product: `[O]`, f32, f16 or bf16. Default: nothing.
    pub bias: Option<&'a Array>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl RmsNormLinearOptions<'_> {
    /// The default of [`RmsNormLinearOptions::eps`].
    pub const DEFAULT_EPS: f32 = RmsNormOptions::DEFAULT_EPS;
}

impl Default for RmsNormLinearOptions<'_> {
    fn default() -> Self {
        let (eps, dispatch) = (Self::DEFAULT_EPS, Dispatch::Auto);
        Self { eps, unit_offset: false, bias: None, dispatch }
    }
}

/// Scales each row of `x` as [`rms_norm`](super::rms_norm()) does and multiplies it by a linear layer's weight.
///
/// `y = (x / sqrt(mean(x²) + eps) · norm_weight) · weightᵀ + bias`, with `1 + norm_weight` for `norm_weight` where
/// [`RmsNormLinearOptions::unit_offset`] says so; the mean is over the last axis and in f32 whatever the dtype.
///
/// # Shapes
/// - `x`: `[..., I]`, f32, f16 or bf16
/// - `norm_weight`: `[I]`, any of those
/// - `weight`: `[O, I]`, any of those
/// - result: `[..., O]` in the dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `norm_weight` is not `[I]`, `weight` not `[O, I]` or the bias not
/// `[O]`, when any is not floating point, or when `eps` is negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{RmsNormLinearOptions, rms_norm_linear};
/// use mlx_rs::array;
///
/// let (x, norm_weight) = (array!([[3.0, 4.0]]), array!([1.0, 2.0]));
/// let weight = array!([[1.0, 0.0], [1.0, 1.0], [0.0, -1.0]]);
/// let options = RmsNormLinearOptions { eps: 0.0, ..Default::default() };
/// let y = rms_norm_linear(&x, &norm_weight, &weight, options)?;
/// assert!(y.all_close(array!([[0.848_528, 3.111_270, -2.262_742]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused norm, which rounds its result to the dtype of `x`, and MLX's product. `Kernel` reads the
/// weight once and computes in f32 what it rounds once; it takes one row, as in decoding, and a weight of the dtype of
/// `x`, which is copied first if it is a transposed view. Its gradient is that of `Reference`, which is plain ops in f32.
/// `Auto` takes MLX's two ops everywhere: on an H200 they were as fast or faster.
///
/// Zhang and Sennrich, [Root Mean Square Layer Normalization](https://arxiv.org/abs/1910.07467), 2019.
pub fn rms_norm_linear(
    x: impl AsRef<Array>,
    norm_weight: impl AsRef<Array>,
    weight: impl AsRef<Array>,
    options: RmsNormLinearOptions<'_>,
) -> Result<Array> {
    let (x, norm_weight, weight) = (x.as_ref(), norm_weight.as_ref(), weight.as_ref());
    let problem = Problem::new(x, norm_weight, weight, &options)?;
    let (bias, scaling) = (problem.bias, problem.scaling);
    match options.dispatch.resolve(&problem)? {
        _ if problem.is_empty() => problem.empty(),
        Backend::Builtin => builtin(&problem),
        Backend::Kernel => kernel::rms_norm_linear(&problem),
        Backend::Reference => reference::rms_norm_linear(x, norm_weight, weight, bias, scaling),
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    norm_weight: &'a Array,
    weight: &'a Array,
    bias: Option<&'a Array>,
    scaling: Scaling,
}

impl<'a> Problem<'a> {
    fn new(
        x: &'a Array,
        norm_weight: &'a Array,
        weight: &'a Array,
        options: &RmsNormLinearOptions<'a>,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        check.floating("x", x)?;
        let inputs = check.last_axis("x", x)?;
        check.floating("norm_weight", norm_weight)?;
        check.shape("norm_weight", norm_weight, axes![inputs])?;
        check.floating("weight", weight)?;
        check.shape("weight", weight, axes!["O", inputs])?;
        if let Some(bias) = options.bias {
            check.floating("bias", bias)?;
            check.shape("bias", bias, axes![weight.dim(0)])?;
        }
        check.non_negative("eps", options.eps)?;
        let scaling = Scaling { eps: options.eps, unit_offset: options.unit_offset };
        Ok(Self { x, norm_weight, weight, bias: options.bias, scaling })
    }

    /// MLX's products of empty matrices differ from device to device, so none is asked for.
    fn is_empty(&self) -> bool {
        self.x.size() == 0 || self.weight.size() == 0
    }

    fn empty(&self) -> Result<Array> {
        let (_, leading) = self.x.shape().split_last().unwrap_or((&0, &[]));
        Ok(zeros_dtype(&[leading, &self.weight.shape()[..1]].concat(), self.x.dtype())?)
    }

    /// Why the kernel cannot take these arrays, if it cannot.
    fn unfit(&self) -> Option<&'static str> {
        if self.x.size() != self.norm_weight.size() {
            Some("the kernel takes one row")
        } else if self.weight.dtype() != self.x.dtype() {
            Some("the kernel takes a weight of the dtype of x")
        } else if self.weight.dim(0) > kernel::MAX_OUTPUTS {
            Some("the kernel takes no more than 2^27 outputs")
        } else {
            None
        }
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "rms_norm_linear";

    fn choose(&self, _: &Context) -> Backend {
        Backend::Builtin
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => {
                context.obstacle.or_else(|| refusal([self.x, self.weight])).or_else(|| self.unfit())
            }
            _ => None,
        }
    }
}

fn builtin(problem: &Problem) -> Result<Array> {
    let (x, scaling) = (problem.x, problem.scaling);
    let factor = scaling.factor(problem.norm_weight)?;
    let normed = mlx_rs::fast::rms_norm(x, Some(&factor), scaling.eps)?.as_dtype(x.dtype())?;
    let y = match problem.bias {
        Some(bias) => addmm(bias, normed, problem.weight.t(), None, None)?,
        None => matmul(normed, problem.weight.t())?,
    };
    Ok(y.as_dtype(x.dtype())?)
}
