//! Layer normalization.

mod module;
mod reference;

pub use module::{LayerNorm, LayerNormBuilder};

use mlx_rs::{Array, Dtype};

use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched, NO_KERNEL, Target},
    error::Result,
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
/// `Builtin` is MLX's fused op, and what `Auto` takes, but on an NVIDIA GPU where `D` is above 4 and
/// no multiple of it: there the gradient of MLX 0.32.2 is wrong. `Reference` is plain ops. A `weight` or `bias`
/// of a wider dtype than `x` makes the fused op convert `x` and the result back: load them in the
/// dtype you compute in.
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
        Backend::Reference => reference::layer_norm(&problem),
        _ => builtin(&problem),
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    weight: Option<&'a Array>,
    bias: Option<&'a Array>,
    eps: f32,
    dtype: Dtype,
    dims: i32,
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
        Ok(Self { x, weight, bias, eps, dtype, dims })
    }

    /// MLX's CUDA kernel reads four elements at a time, and its gradient counts the missing ones of
    /// the last four in; a row of fewer than four is read another way.
    fn has_builtin_gradient(&self, context: &Context) -> bool {
        context.target != Target::Cuda || self.dims < 4 || self.dims % 4 == 0
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "layer_norm";

    fn choose(&self, context: &Context) -> Backend {
        if self.has_builtin_gradient(context) { Backend::Builtin } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => Some(NO_KERNEL),
            Backend::Builtin if !self.has_builtin_gradient(context) => {
                Some("MLX's CUDA gradient is wrong unless D is a multiple of 4")
            }
            _ => None,
        }
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

    #[test]
    fn a_wrong_gradient_is_gone_around() -> Result<()> {
        for (target, dims, expected) in [
            (Target::Cuda, 3, Backend::Builtin),
            (Target::Cuda, 5, Backend::Reference),
            (Target::Cuda, 64, Backend::Builtin),
            (Target::Cuda, 65, Backend::Reference),
            (Target::Metal, 65, Backend::Builtin),
            (Target::Cpu, 65, Backend::Builtin),
        ] {
            let x = Array::zeros::<f32>(&[2, dims])?;
            let problem = Problem::new(&x, None, None, 1e-5)?;
            let context = Context { target, obstacle: None, settings: Settings::default() };
            assert_eq!(problem.choose(&context), expected, "{target:?} {dims}");
            let refused = problem.refusal(Backend::Builtin, &context).is_some();
            assert_eq!(refused, expected == Backend::Reference, "{target:?} {dims}");
        }
        Ok(())
    }
}
