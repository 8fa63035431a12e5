//! A function for each activation.

use mlx_rs::Array;

use super::Activation;
use crate::error::Result;

/// Writes one function an activation. What they share is said once, at [`Activation::apply`].
macro_rules! functions {
    ($($(#[$formula:meta])* $name:ident => $activation:ident;)*) => {$(
        $(#[$formula])*
        ///
        /// # Shapes
        /// `x`: any, f32, f16 or bf16; the result has its shape and dtype.
        ///
        /// # Errors
        /// When `x` is not floating point.
        ///
        /// # Example
        /// ```
        #[doc = concat!("use mlx_primitives::activation::", stringify!($name), ";")]
        /// use mlx_rs::array;
        ///
        #[doc = concat!("let y = ", stringify!($name), "(array!([-1.0, 0.0, 1.0]))?;")]
        /// assert_eq!(y.shape(), [3]);
        /// # Ok::<(), mlx_primitives::Error>(())
        /// ```
        ///
        /// # Backends
        /// Those of [`Activation::apply`], which it calls.
        pub fn $name(x: impl AsRef<Array>) -> Result<Array> {
            Activation::$activation.apply(x)
        }
    )*};
}

functions! {
    /// Clamps each element to zero from below: `max(x, 0)`.
    relu => Relu;
    /// Clamps each element to `[0, 6]`.
    relu6 => Relu6;
    /// Squares each positive element and drops the others: `max(x, 0)²`.
    relu_squared => ReluSquared;
    /// Shrinks each negative element a hundredfold: `max(x, x / 100)`.
    leaky_relu => LeakyRelu;
    /// Squashes each element into `(0, 1)`: `σ(x) = 1 / (1 + exp(-x))`.
    sigmoid => Sigmoid;
    /// Squashes each element into `(-1, 1)`.
    tanh => Tanh;
    /// Scales each element by its own sigmoid: `x · σ(x)`.
    silu => Silu;
    /// Scales each element by its normal distribution, exactly: `x · (1 + erf(x / √2)) / 2`.
    gelu => Gelu;
    /// Approximates [`gelu`] closely: `x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2`.
    gelu_tanh => GeluTanh;
    /// Approximates [`gelu`] cheaply: `x · σ(1.702 x)`.
    quick_gelu => QuickGelu;
    /// Scales each element by the tanh of its softplus: `x · tanh(ln(1 + exp(x)))`.
    mish => Mish;
    /// Rounds off the corner of [`relu`]: `ln(1 + exp(x))`.
    softplus => Softplus;
    /// Approximates [`sigmoid`] by three lines: `min(max(x + 3, 0), 6) / 6`.
    hard_sigmoid => HardSigmoid;
    /// Approximates [`silu`] by [`hard_sigmoid`]: `x · min(max(x + 3, 0), 6) / 6`.
    hard_swish => HardSwish;
}
