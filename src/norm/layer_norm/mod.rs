//! Layer normalization.

pub(super) mod kernel;
mod module;
pub(super) mod reference;

pub(crate) use kernel::KERNELS;
pub use module::{LayerNorm, LayerNormBuilder};

use mlx_rs::{Array, Dtype};

use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched, Target},
    error::Result,
    kernel::Rows,
};

/// Options of [`layer_norm`].
#[derive(Debug, Clone)]
pub struct LayerNormOptions {
    /// Added to the variance, so that a constant row stays finite. Default: 1e-5.
    pub eps: f32,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl LayerNormOptions {
    /// The default of [`LayerNormOptions::eps`].
    pub const DEFAULT_EPS: f32 = 1e-5;
}

impl Default for LayerNormOptions {
    fn default() -> Self {
        Self { eps: Self::DEFAULT_EPS, dispatch: Dispatch::Auto }
    }
}

/// Shifts each row of `x` to mean zero, scales it to variance one, then applies `weight` and `bias`.
///
/// `y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`, with the mean and the (biased) variance
/// over the last axis, in f32 whatever the dtype.
///
/// # Shapes
/// - `x`: `[..., D]`, f32, f16 or bf16
/// - `weight`: `[D]`, any of those; without one, nothing is scaled
/// - `bias`: `[D]`, any of those; without one, nothing is shifted. Neither needs the other
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `weight` or `bias` is not `[D]`, when any of the
/// three is not floating point, or when `eps` is negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{LayerNormOptions, layer_norm};
/// use mlx_rs::array;
///
/// let x = array!([[1.0, 3.0]]);
/// let y = layer_norm(&x, None, &array!([10.0, 20.0]), LayerNormOptions::default())?;
/// assert!(y.all_close(array!([[9.0, 21.0]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused op, and what `Auto` takes on a CPU and on an Apple GPU. `Kernel` reads and writes memory once,
/// as does its gradient, and is what `Auto` takes on an NVIDIA GPU, where the threads of MLX's fused op race. `Reference` is plain ops. There, `Builtin` refuses a
/// `D` above 4 that is no multiple of it, for which the gradient of MLX 0.32.2 is wrong. A `weight` or `bias` of a wider
/// dtype than `x` makes the fused op convert `x` and the result back: load them in the dtype you compute in.
///
/// Ba, Kiros and Hinton, [Layer Normalization](https://arxiv.org/abs/1607.06450), 2016.
pub fn layer_norm<'a>(
    x: impl AsRef<Array>,
    weight: impl Into<Option<&'a Array>>,
    bias: impl Into<Option<&'a Array>>,
    options: LayerNormOptions,
) -> Result<Array> {
    let problem = Problem::new(x.as_ref(), weight.into(), bias.into(), options.eps)?;
    match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if problem.x.size() == 0 => Ok(problem.x.clone()),
        Backend::Builtin => builtin(&problem),
        Backend::Kernel => kernel::layer_norm(&problem),
        Backend::Reference => {
            reference::layer_norm(problem.x, problem.weight, problem.bias, problem.eps)
        }
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    weight: Option<&'a Array>,
    bias: Option<&'a Array>,
    eps: f32,
    dtype: Dtype,
}

impl<'a> Problem<'a> {
    fn new(
        x: &'a Array,
        weight: Option<&'a Array>,
        bias: Option<&'a Array>,
        eps: f32,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("x", x)?;
        let dims = check.last_axis("x", x)?;
        for (name, array) in [("weight", weight), ("bias", bias)] {
            if let Some(array) = array {
                check.floating(name, array)?;
                check.shape(name, array, axes![dims])?;
            }
        }
        check.non_negative("eps", eps)?;
        Ok(Self { x, weight, bias, eps, dtype })
    }
}

/// Whether MLX's fused op has a gradient for rows of `dims` elements.
///
/// Its CUDA kernel reads four elements at a time, and its gradient counts the missing ones of the last four in; a row of
/// fewer than four is read another way.
fn has_builtin_gradient(dims: i32, context: &Context) -> bool {
    context.target != Target::Cuda || dims < 4 || dims % 4 == 0
}

/// The choice for rows of `x`, which is that of every operation which ends in this norm.
///
/// MLX's CUDA op and its gradient add up twice through the same shared memory, with no barrier in between: NVIDIA's race
/// checker reports it, and under that tool's timing the result is NaN.
pub(super) fn choose(x: &Array, context: &Context) -> Backend {
    match context.target {
        Target::Cpu | Target::Metal => Backend::Builtin,
        Target::Cuda if backend_refusal(x, Backend::Kernel, context).is_none() => Backend::Kernel,
        Target::Cuda => Backend::Reference,
    }
}

/// Why `backend` cannot normalize rows of `x`, if it cannot.
pub(super) fn backend_refusal(
    x: &Array,
    backend: Backend,
    context: &Context,
) -> Option<&'static str> {
    match backend {
        Backend::Kernel => context.obstacle.or_else(|| Rows::refusal(x)),
        Backend::Builtin if !has_builtin_gradient(x.dim(-1), context) => {
            Some("MLX's CUDA gradient is wrong unless D is a multiple of 4")
        }
        _ => None,
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "layer_norm";

    fn choose(&self, context: &Context) -> Backend {
        choose(self.x, context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        backend_refusal(self.x, backend, context)
    }
}

fn builtin(problem: &Problem) -> Result<Array> {
    let y = mlx_rs::fast::layer_norm(problem.x, problem.weight, problem.bias, problem.eps)?;
    Ok(y.as_dtype(problem.dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn chosen(target: Target, shape: &[i32]) -> Result<(Backend, bool)> {
        let x = Array::zeros::<f32>(shape)?;
        let problem = Problem::new(&x, None, None, 1e-5)?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        let refused = problem.refusal(Backend::Builtin, &context).is_some();
        Ok((problem.choose(&context), refused))
    }

    #[test]
    fn the_kernel_is_for_cuda() -> Result<()> {
        for shape in [[16384, 4096], [2, 64], [2, 65], [8192, 8197]] {
            assert_eq!(chosen(Target::Cuda, &shape)?.0, Backend::Kernel, "{shape:?}");
            assert_eq!(chosen(Target::Metal, &shape)?.0, Backend::Builtin, "{shape:?}");
            assert_eq!(chosen(Target::Cpu, &shape)?.0, Backend::Builtin, "{shape:?}");
        }
        Ok(())
    }

    #[test]
    fn no_kernel_takes_an_empty_array() -> Result<()> {
        assert_eq!(chosen(Target::Cuda, &[0, 64])?.0, Backend::Reference);
        Ok(())
    }

    #[test]
    fn a_wrong_gradient_is_refused() -> Result<()> {
        for (target, dims, refused) in [
            (Target::Cuda, 3, false),
            (Target::Cuda, 5, true),
            (Target::Cuda, 64, false),
            (Target::Cuda, 65, true),
            (Target::Metal, 65, false),
            (Target::Cpu, 65, false),
        ] {
            assert_eq!(chosen(target, &[2, dims])?.1, refused, "{target:?} {dims}");
        }
        Ok(())
    }
}
