//! The layer: weights and [`causal_conv1d`](super::causal_conv1d).

use mlx_rs::{
    Array,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    random::uniform,
};

use super::{CausalConvOptions, causal_conv1d_with_state};
use crate::{builder::builder, check::Check, error::Result};

builder! {
    /// Builder for [`CausalConv1d`].
    CausalConv1dBuilder => CausalConv1d (
        /// The size of the last axis, `D`.
        dims: i32,
        /// Weights of a channel, `W`.
        width: i32,
    ) {
        /// Whether there is a bias; `true` by default.
        bias: bool = true,
        /// See [`CausalConvOptions::silu`]; `false` by default.
        silu: bool = false,
    }
}

/// [`causal_conv1d`](super::causal_conv1d) with trainable weights.
///
/// # Shapes
/// `[B, L, D]` to `[B, L, D]`.
///
/// # Example
/// ```
/// use mlx_primitives::scan::CausalConv1d;
/// use mlx_rs::{Array, module::Module};
///
/// let mut conv = CausalConv1d::new(64, 4)?;
/// assert_eq!(conv.forward(&Array::ones::<f32>(&[2, 10, 64])?)?.shape(), [2, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct CausalConv1d {
    /// `[D, 1, W]`, as PyTorch has it; `[D, W, 1]`, as MLX does, may be loaded in its place.
    #[param]
    pub weight: Param<Array>,
    /// `[D]`.
    #[param]
    pub bias: Param<Option<Array>>,
    /// See [`CausalConvOptions::silu`].
    pub silu: bool,
}

impl CausalConv1d {
    /// A convolution with a bias.
    ///
    /// # Errors
    /// When `dims` or `width` is below one.
    pub fn new(dims: i32, width: i32) -> Result<Self> {
        Self::assemble(CausalConv1dBuilder::new(dims, width))
    }

    fn assemble(builder: CausalConv1dBuilder) -> Result<Self> {
        let CausalConv1dBuilder { dims, width, bias, silu } = builder;
        let check = Check::op("CausalConv1d");
        check.at_least("dims", dims, 1)?;
        check.at_least("width", width, 1)?;
        let bound = (width as f32).sqrt().recip();
        let random = |shape: &[i32]| uniform::<_, f32>(-bound, bound, shape, None);
        let bias = if bias { Some(random(&[dims])?) } else { None };
        Ok(Self { weight: Param::new(random(&[dims, 1, width])?), bias: Param::new(bias), silu })
    }

    /// From the inputs before the first, or from zeros: outputs, and the inputs that later steps will see.
    ///
    /// # Errors
    /// Those of [`causal_conv1d`](super::causal_conv1d).
    pub fn with_state(&self, x: &Array, state: Option<&Array>) -> Result<(Array, Array)> {
        let dims = self.weight.shape().first().copied().unwrap_or(0);
        let weight = self.weight.reshape(&[dims, -1])?;
        let options = CausalConvOptions {
            bias: self.bias.value.as_ref(),
            silu: self.silu,
            initial_state: state,
            segments: None,
        };
        causal_conv1d_with_state(x, weight, options)
    }
}

impl Module<&Array> for CausalConv1d {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        Ok(self.with_state(x, None)?.0)
    }

    fn training_mode(&mut self, _: bool) {}
}
