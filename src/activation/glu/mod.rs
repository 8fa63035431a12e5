//! Gated linear units: one array scaled by the activation of another.

mod module;
mod reference;

pub use module::Glu;

use mlx_rs::Array;

use super::{Activation, fused::Fused, pointwise};
use crate::{
    check::{Axis, Check},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
};

/// Options of [`glu`](glu()).
#[derive(Debug, Clone)]
pub struct GluOptions {
    /// What the gate goes through. Default: [`Activation::Silu`].
    pub activation: Activation,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for GluOptions {
    fn default() -> Self {
        Self { activation: Activation::Silu, dispatch: Dispatch::Auto }
    }
}

/// Scales `up` by the activation of `gate`.
///
/// `y = activation(gate) · up`, in f32 whatever the dtype, rounded once.
///
/// # Shapes
/// - `gate`: any, f32, f16 or bf16
/// - `up`: the shape and dtype of `gate`
/// - result: the same
///
/// # Errors
/// When `gate` is not floating point, or when `up` has another shape or dtype.
///
/// # Example
/// ```
/// use mlx_primitives::activation::{Activation, GluOptions, glu};
/// use mlx_rs::array;
///
/// let options = GluOptions { activation: Activation::Sigmoid, ..Default::default() };
/// let y = glu(array!([0.0, 0.0]), array!([2.0, -4.0]), options)?;
/// assert!(y.all_close(array!([1.0, -2.0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's compiler, which fuses the formula and its conversions into one kernel: two reads
/// and one write. Its gradient is that of plain ops. `Reference` is plain ops, each a pass over
/// memory. `Auto` takes the first on a GPU and the second on the CPU, where the former would start a
/// C++ compiler and gain nothing.
///
/// Shazeer, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), 2020.
pub fn glu(gate: impl AsRef<Array>, up: impl AsRef<Array>, options: GluOptions) -> Result<Array> {
    let activation = options.activation;
    let problem = Problem::new(gate.as_ref(), up.as_ref())?;
    match options.dispatch.resolve(&problem)? {
        Backend::Reference => reference::glu(activation, &problem.inputs),
        _ => FUSED
            .try_with(|fused| fused.call(activation, &problem.inputs))
            .unwrap_or_else(|_| reference::glu(activation, &problem.inputs)),
    }
}

thread_local! {
    static FUSED: Fused = Fused::new(reference::glu);
}

/// Writes one function a published variant.
macro_rules! variants {
    ($($(#[$formula:meta])* $name:ident => $activation:ident;)*) => {$(
        $(#[$formula])*
        ///
        /// # Shapes
        /// `gate` and `up`: one shape and one of f32, f16 and bf16, both the result's.
        ///
        /// # Errors
        /// When `gate` is not floating point, or when `up` has another shape or dtype.
        ///
        /// # Example
        /// ```
        #[doc = concat!("use mlx_primitives::activation::", stringify!($name), ";")]
        /// use mlx_rs::array;
        ///
        #[doc = concat!("let y = ", stringify!($name), "(array!([0.0, 9.0]), array!([2.0, 3.0]))?;")]
        /// assert!(y.all_close(array!([0.0, 27.0]), 1e-3, None, None)?);
        /// # Ok::<(), mlx_primitives::Error>(())
        /// ```
        ///
        /// # Backends
        /// Those of [`glu`](glu()), which it calls.
        pub fn $name(gate: impl AsRef<Array>, up: impl AsRef<Array>) -> Result<Array> {
            let activation = Activation::$activation;
            glu(gate, up, GluOptions { activation, ..Default::default() })
        }
    )*};
}

variants! {
    /// Scales `up` by the [`Silu`](Activation::Silu) of `gate`.
    swiglu => Silu;
    /// Scales `up` by the exact [`Gelu`](Activation::Gelu) of `gate`.
    geglu => Gelu;
    /// Scales `up` by the [`GeluTanh`](Activation::GeluTanh) of `gate`.
    geglu_tanh => GeluTanh;
    /// Scales `up` by the [`Relu`](Activation::Relu) of `gate`.
    reglu => Relu;
}

/// A checked call.
struct Problem {
    /// The gate, then what it scales.
    inputs: [Array; 2],
}

impl Problem {
    fn new(gate: &Array, up: &Array) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("gate", gate)?;
        check.dtype_among("up", up, &[dtype])?;
        let axes: Vec<_> = gate.shape().iter().copied().map(Axis::from).collect();
        check.shape("up", up, &axes)?;
        Ok(Self { inputs: [gate.clone(), up.clone()] })
    }
}

impl Dispatched for Problem {
    const OP: &'static str = "glu";

    fn choose(&self, context: &Context) -> Backend {
        pointwise::choose(context)
    }
}
