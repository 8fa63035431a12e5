//! Gated linear units: one array scaled by the activation of another.

mod kernel;
mod module;
mod reference;

pub(crate) use kernel::KERNELS;
pub use module::Glu;

use mlx_rs::Array;

use super::{Activation, fused::Fused, pointwise};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    uploads,
};

/// Options of [`glu`](glu()).
#[derive(Debug, Clone)]
pub struct GluOptions<'a> {
    /// What the gate goes through. Default: [`Activation::Silu`].
    pub activation: Activation,
    /// `[F]`: added to the gate. Default: nothing.
    pub gate_bias: Option<&'a Array>,
    /// `[F]`: added to what is gated. Default: nothing.
    pub up_bias: Option<&'a Array>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for GluOptions<'_> {
    fn default() -> Self {
        let (gate_bias, up_bias) = (None, None);
        Self { activation: Activation::Silu, gate_bias, up_bias, dispatch: Dispatch::Auto }
    }
}

/// Scales `up` by the activation of `gate`.
///
/// `y = activation(gate + gate_bias) · (up + up_bias)`, in f32 whatever the dtype, rounded once.
///
/// # Shapes
/// - `gate`: any, f32, f16 or bf16; with a bias, `[..., F]`
/// - `up`: the shape and dtype of `gate`
/// - [`GluOptions::gate_bias`], [`GluOptions::up_bias`]: `[F]`, any of those dtypes
/// - result: the shape and dtype of `gate`
///
/// # Errors
/// When `gate` is not floating point, when `up` has another shape or dtype, when a bias is not `[F]` or not floating
/// point, or when there is one and `gate` has no last axis or an empty one.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
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
/// and one write. Its gradient is that of plain ops. `Kernel` does as much, and its gradient is one
/// more kernel: three reads and two writes; it copies views that are not contiguous. `Reference` is
/// plain ops, each a pass over memory. `Auto` takes the second for large arrays on an NVIDIA GPU, the first on an
/// Apple GPU, and the last on the CPU, where the compiler would start a C++ compiler and gain nothing.
///
/// Shazeer, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), 2020.
pub fn glu(
    gate: impl AsRef<Array>,
    up: impl AsRef<Array>,
    options: GluOptions<'_>,
) -> Result<Array> {
    let problem = Problem::new(gate.as_ref(), up.as_ref(), &options)?;
    let activation = problem.activation;
    match options.dispatch.resolve(&problem)? {
        Backend::Builtin => FUSED
            .try_with(|fused| fused.call(activation, &problem.inputs()))
            .unwrap_or_else(|_| reference::glu(activation, &problem.inputs())),
        Backend::Kernel => kernel::glu(&problem),
        Backend::Reference => reference::glu(activation, &problem.inputs()),
    }
}

thread_local! {
    static FUSED: Fused<Activation> = Fused::new(reference::glu);
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
struct Problem<'a> {
    activation: Activation,
    gate: &'a Array,
    up: &'a Array,
    /// Of the gate, then of what it scales.
    biases: [Option<&'a Array>; 2],
}

impl<'a> Problem<'a> {
    fn new(gate: &'a Array, up: &'a Array, options: &GluOptions<'a>) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("gate", gate)?;
        check.dtype_among("up", up, &[dtype])?;
        check.same_shape("up", up, gate)?;
        let biases = [("gate_bias", options.gate_bias), ("up_bias", options.up_bias)];
        for (name, bias) in biases {
            if let Some(bias) = bias {
                let width = check.last_axis("gate", gate)?;
                check.floating(name, bias)?;
                check.shape(name, bias, axes![width])?;
            }
        }
        Ok(Self { activation: options.activation, gate, up, biases: biases.map(|(_, bias)| bias) })
    }

    /// What [`reference::glu`] takes.
    fn inputs(&self) -> Vec<Array> {
        let mut inputs = vec![self.gate.clone(), self.up.clone()];
        if self.biases.iter().any(Option::is_some) {
            let bias = |bias: Option<&Array>| bias.cloned().unwrap_or_else(|| uploads::float(0.0));
            inputs.extend(self.biases.map(bias));
        }
        inputs
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "glu";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.gate.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { pointwise::choose(context) }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => context.obstacle.or_else(|| kernel::refusal(self)),
            _ => None,
        }
    }
}
