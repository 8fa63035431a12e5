//! Residual addition and layer normalization in one.

mod kernel;
mod reference;

pub(crate) use kernel::KERNELS;

use mlx_rs::Array;

use super::layer_norm::{self, LayerNormOptions};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatched},
    error::Result,
};

/// Adds `residual` to `x` and normalizes each row of the sum as [`layer_norm`](super::layer_norm()) does: returns the
/// normalized rows and the sum, which is the next residual.
///
/// `s = x + residual`, `y = (s - mean(s)) / sqrt(var(s) + eps) · weight + bias`, with the mean and the (biased) variance
/// over the last axis, in f32 whatever the dtype.
///
/// # Shapes
/// - `x`, `residual`: `[..., D]`, of one shape and dtype: f32, f16 or bf16
/// - `weight`: `[D]`, any of those; without one, nothing is scaled
/// - `bias`: `[D]`, any of those; without one, nothing is shifted. Neither needs the other
/// - results: `y` and `s`, both of the shape and dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `residual` differs from `x` in shape or dtype, when `weight` or `bias`
/// is not `[D]`, when any is not floating point, or when `eps` is negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{LayerNormOptions, add_layer_norm};
/// use mlx_rs::array;
///
/// let (x, residual) = (array!([[1.0, 1.0]]), array!([[0.0, 2.0]]));
/// let bias = array!([10.0, 20.0]);
/// let (y, sum) = add_layer_norm(&x, &residual, None, &bias, LayerNormOptions::default())?;
/// assert_eq!(sum.as_slice::<f32>(), [1.0, 3.0]);
/// assert!(y.all_close(array!([[9.0, 21.0]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` adds and calls MLX's fused norm. `Kernel` does both in one pass over memory, and its gradient too; `Auto`
/// takes it on an NVIDIA GPU, where `Builtin` refuses a `D` above 4 that is no multiple of it: there the gradient of MLX
/// 0.32.2 is wrong. `Reference` is plain ops.
pub fn add_layer_norm<'a>(
    x: impl AsRef<Array>,
    residual: impl AsRef<Array>,
    weight: impl Into<Option<&'a Array>>,
    bias: impl Into<Option<&'a Array>>,
    options: LayerNormOptions,
) -> Result<(Array, Array)> {
    let (x, residual) = (x.as_ref(), residual.as_ref());
    let problem = Problem::new(x, residual, weight.into(), bias.into(), options.eps)?;
    let [y, sum] = match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if x.size() == 0 => [x.clone(), x.clone()],
        Backend::Builtin => builtin(&problem)?,
        Backend::Kernel => kernel::add_layer_norm(&problem)?,
        Backend::Reference => {
            reference::add_layer_norm(x, residual, problem.weight, problem.bias, problem.eps)?
        }
    };
    Ok((y, sum))
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    residual: &'a Array,
    weight: Option<&'a Array>,
    bias: Option<&'a Array>,
    eps: f32,
}

impl<'a> Problem<'a> {
    fn new(
        x: &'a Array,
        residual: &'a Array,
        weight: Option<&'a Array>,
        bias: Option<&'a Array>,
        eps: f32,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("x", x)?;
        let dims = check.last_axis("x", x)?;
        check.same_shape("residual", residual, x)?;
        check.dtype_among("residual", residual, &[dtype])?;
        for (name, array) in [("weight", weight), ("bias", bias)] {
            if let Some(array) = array {
                check.floating(name, array)?;
                check.shape(name, array, axes![dims])?;
            }
        }
        check.non_negative("eps", eps)?;
        Ok(Self { x, residual, weight, bias, eps })
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "add_layer_norm";

    fn choose(&self, context: &Context) -> Backend {
        layer_norm::choose(self.x, context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        layer_norm::backend_refusal(self.x, backend, context)
    }
}

fn builtin(problem: &Problem) -> Result<[Array; 2]> {
    let sum = problem.x.add(problem.residual)?;
    let y = mlx_rs::fast::layer_norm(&sum, problem.weight, problem.bias, problem.eps)?;
    Ok([y.as_dtype(sum.dtype())?, sum])
}
