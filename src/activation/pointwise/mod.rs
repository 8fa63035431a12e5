//! Functions of one element.

mod functions;
mod module;
mod names;
pub(super) mod reference;

pub use functions::{
    gelu, gelu_tanh, hard_sigmoid, hard_swish, leaky_relu, mish, quick_gelu, relu, relu_squared,
    relu6, sigmoid, silu, softplus, tanh,
};

use mlx_rs::Array;

use super::fused::Fused;
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched, Target},
    error::Result,
};

/// A function applied to each element.
///
/// It parses from the names that model files use ("silu", "gelu_pytorch_tanh", "relu2") and prints
/// its own. As a [`Module`](mlx_rs::module::Module) it has no parameters, so that it can stand in
/// [`nn::Sequential`](mlx_rs::nn::Sequential).
///
/// # Example
/// ```
/// use mlx_primitives::activation::Activation;
/// use mlx_rs::array;
///
/// let activation: Activation = "relu2".parse()?;
/// let y = activation.apply(array!([-1.0, 3.0]))?;
/// assert!(y.all_close(array!([0.0, 9.0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x`
    Identity,
    /// `max(x, 0)`
    Relu,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// `max(x, 0)²`. So et al., [Primer](https://arxiv.org/abs/2109.08668), 2021.
    ReluSquared,
    /// `max(x, x / 100)`
    LeakyRelu,
    /// `σ(x) = 1 / (1 + exp(-x))`
    Sigmoid,
    /// `tanh(x)`
    Tanh,
    /// `x · σ(x)`, also called Swish. Elfwing et al.,
    /// [Sigmoid-Weighted Linear Units](https://arxiv.org/abs/1702.03118), 2017.
    Silu,
    /// `x · Φ(x)` with the normal distribution `Φ(x) = (1 + erf(x / √2)) / 2`, exactly. Hendrycks and
    /// Gimpel, [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415), 2016.
    Gelu,
    /// `x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2`, the closer approximation of [`Gelu`](Self::Gelu).
    GeluTanh,
    /// `x · σ(1.702 x)`, the cheaper approximation of [`Gelu`](Self::Gelu).
    QuickGelu,
    /// `x · tanh(softplus(x))`. Misra, [Mish](https://arxiv.org/abs/1908.08681), 2019.
    Mish,
    /// `ln(1 + exp(x))`
    Softplus,
    /// `min(max(x + 3, 0), 6) / 6`. Howard et al.,
    /// [Searching for MobileNetV3](https://arxiv.org/abs/1905.02244), 2019.
    HardSigmoid,
    /// `x · min(max(x + 3, 0), 6) / 6`, of the same paper.
    HardSwish,
}

thread_local! {
    static FUSED: Fused<Activation> = Fused::new(reference::pointwise);
}

impl Activation {
    /// Applies the function to each element, in f32 whatever the dtype.
    ///
    /// Values and gradients stay finite for elements of any magnitude up to 1e4, but for the square
    /// of [`ReluSquared`](Self::ReluSquared) in f16.
    ///
    /// # Shapes
    /// `x`: any, f32, f16 or bf16; the result has its shape and dtype.
    ///
    /// # Errors
    /// When `x` is not floating point.
    ///
    /// # Example
    /// ```
    /// use mlx_primitives::activation::Activation;
    /// use mlx_rs::array;
    ///
    /// let y = Activation::Silu.apply(array!([0.0, 1.0]))?;
    /// assert!(y.all_close(array!([0.0, 0.731_058_6]), None, None, None)?);
    /// # Ok::<(), mlx_primitives::Error>(())
    /// ```
    ///
    /// # Backends
    /// `Builtin` is MLX's compiler, which fuses the formula and its conversions into one kernel; its
    /// gradient is that of plain ops. `Reference` is plain ops, each a pass over memory. The function
    /// takes the first on a GPU and the second on the CPU, where the former would start a C++
    /// compiler and gain nothing.
    pub fn apply(self, x: impl AsRef<Array>) -> Result<Array> {
        self.apply_on(x, Dispatch::Auto)
    }

    /// [`apply`](Self::apply) on a backend of the caller's choice.
    ///
    /// # Errors
    /// As [`apply`](Self::apply), and when that backend is absent.
    pub fn apply_on(self, x: impl AsRef<Array>, dispatch: Dispatch) -> Result<Array> {
        let x = x.as_ref();
        Check::op(self.name()).floating("x", x)?;
        let inputs = [x.clone()];
        match dispatch.resolve(&Problem)? {
            Backend::Reference => reference::pointwise(self, &inputs),
            _ => FUSED
                .try_with(|fused| fused.call(self, &inputs))
                .unwrap_or_else(|_| reference::pointwise(self, &inputs)),
        }
    }
}

/// A checked call; nothing in it bears on the choice.
struct Problem;

impl Dispatched for Problem {
    const OP: &'static str = "activation";

    fn choose(&self, context: &Context) -> Backend {
        choose(context)
    }
}

/// Fusing is what a GPU gains from.
pub(super) fn choose(context: &Context) -> Backend {
    match context.target {
        Target::Cpu => Backend::Reference,
        Target::Metal | Target::Cuda => Backend::Builtin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn only_a_gpu_fuses() {
        let on =
            |target| choose(&Context { target, obstacle: None, settings: Settings::default() });
        assert_eq!(on(Target::Cpu), Backend::Reference);
        assert_eq!(on(Target::Metal), Backend::Builtin);
        assert_eq!(on(Target::Cuda), Backend::Builtin);
    }
}
