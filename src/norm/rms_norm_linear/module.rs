//! The layer: a norm, a linear layer and [`rms_norm_linear`].

use mlx_rs::{
    Array, builder::Builder, error::Exception, macros::ModuleParameters, module::Module, nn,
};

use super::{RmsNormLinearOptions, rms_norm_linear};
use crate::{
    builder::builder,
    check::Check,
    error::Result,
    norm::{RmsNorm, RmsNormBuilder},
};

builder! {
    /// Builder for [`RmsNormLinear`].
    RmsNormLinearBuilder => RmsNormLinear (
        /// The size of the last axis of inputs.
        input_dims: i32,
        /// The size of the last axis of results.
        output_dims: i32,
    ) {
        /// Added to the mean square; [`RmsNorm::DEFAULT_EPS`] by default.
        eps: f32 = RmsNorm::DEFAULT_EPS,
        /// Whether rows are scaled by one plus the norm's weight, as in Gemma; no by default.
        unit_offset: bool = false,
        /// Whether the linear layer adds a bias; no by default.
        bias: bool = false,
    }
}

/// A norm and a linear layer that run as one: [`rms_norm_linear`] with trainable weights.
///
/// Its parameters are those of the two, `norm.weight`, `linear.weight` and, if there is one, `linear.bias`.
///
/// # Shapes
/// `[..., I]` to `[..., O]`, in the dtype of the input.
///
/// # Example
/// ```
/// use mlx_primitives::norm::RmsNormLinear;
/// use mlx_rs::{Array, module::Module};
///
/// let mut layer = RmsNormLinear::new(64, 256)?;
/// let y = layer.forward(&Array::ones::<f32>(&[2, 10, 64])?)?;
/// assert_eq!(y.shape(), [2, 10, 256]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct RmsNormLinear {
    /// Its weight is `[I]`.
    #[param]
    pub norm: RmsNorm,
    /// Its weight is `[O, I]`, its bias `[O]`.
    #[param]
    pub linear: nn::Linear,
}

impl RmsNormLinear {
    /// From `input_dims` to `output_dims`, without a bias.
    ///
    /// # Errors
    /// When either is below one.
    pub fn new(input_dims: i32, output_dims: i32) -> Result<Self> {
        Self::assemble(RmsNormLinearBuilder::new(input_dims, output_dims))
    }

    fn assemble(builder: RmsNormLinearBuilder) -> Result<Self> {
        let RmsNormLinearBuilder { input_dims, output_dims, eps, unit_offset, bias } = builder;
        let check = Check::op("RmsNormLinear");
        check.at_least("input_dims", input_dims, 1)?;
        check.at_least("output_dims", output_dims, 1)?;
        check.non_negative("eps", eps)?;
        let norm = RmsNormBuilder::new(input_dims).eps(eps).unit_offset(unit_offset).build()?;
        let linear = nn::LinearBuilder::new(input_dims, output_dims).bias(bias).build()?;
        Ok(Self { norm, linear })
    }
}

impl Module<&Array> for RmsNormLinear {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let Self { norm, linear } = self;
        let options = RmsNormLinearOptions {
            eps: norm.eps,
            unit_offset: norm.unit_offset,
            bias: linear.bias.value.as_ref(),
            ..Default::default()
        };
        Ok(rms_norm_linear(x, &*norm.weight, &*linear.weight, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
