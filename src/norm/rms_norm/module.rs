//! The layer: a weight and [`rms_norm`].

use mlx_rs::{
    Array,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::{ones, zeros},
};

use super::{RmsNormOptions, rms_norm};
use crate::{builder::builder, check::Check, error::Result};

builder! {
    /// Builder for [`RmsNorm`].
    RmsNormBuilder => RmsNorm (
        /// The size of the last axis.
        dims: i32,
    ) {
        /// Added to the mean square; [`RmsNorm::DEFAULT_EPS`] by default.
        eps: f32 = RmsNorm::DEFAULT_EPS,
        /// Whether rows are scaled by `1 + weight`, as in Gemma, and the weight starts at zero; no by default.
        unit_offset: bool = false,
    }
}

/// [`rms_norm`] with a trainable weight that starts at one, or at zero where it is an offset from one.
///
/// # Shapes
/// `[..., D]` to `[..., D]`.
///
/// # Example
/// ```
/// use mlx_primitives::norm::RmsNorm;
/// use mlx_rs::{Array, module::Module};
///
/// let mut norm = RmsNorm::new(64)?;
/// let y = norm.forward(&Array::ones::<f32>(&[2, 10, 64])?)?;
/// assert_eq!(y.shape(), [2, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct RmsNorm {
    /// `[D]`.
    #[param]
    pub weight: Param<Array>,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether rows are scaled by `1 + weight`.
    pub unit_offset: bool,
}

impl RmsNorm {
    /// The default of [`RmsNormBuilder::eps`].
    pub const DEFAULT_EPS: f32 = RmsNormOptions::DEFAULT_EPS;

    /// A norm over a last axis of `dims` elements.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(RmsNormBuilder::new(dims))
    }

    fn assemble(builder: RmsNormBuilder) -> Result<Self> {
        let check = Check::op("RmsNorm");
        check.at_least("dims", builder.dims, 1)?;
        check.non_negative("eps", builder.eps)?;
        let (dims, unit_offset) = (&[builder.dims], builder.unit_offset);
        let weight = if unit_offset { zeros::<f32>(dims)? } else { ones::<f32>(dims)? };
        Ok(Self { weight: Param::new(weight), eps: builder.eps, unit_offset })
    }
}

impl Module<&Array> for RmsNorm {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let (eps, unit_offset) = (self.eps, self.unit_offset);
        let options = RmsNormOptions { eps, unit_offset, ..Default::default() };
        Ok(rms_norm(x, &*self.weight, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
