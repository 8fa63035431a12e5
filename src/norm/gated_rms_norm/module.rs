//! The layer: a weight and [`gated_rms_norm`].

use mlx_rs::{
    Array,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::ones,
};

use super::{GateOrder, GatedRmsNormOptions, gated_rms_norm};
use crate::{builder::builder, check::Check, error::Result};

builder! {
    /// Builder for [`GatedRmsNorm`].
    GatedRmsNormBuilder => GatedRmsNorm (
        /// The size of the last axis.
        dims: i32,
    ) {
        /// Added to the mean square; [`GatedRmsNorm::DEFAULT_EPS`] by default.
        eps: f32 = GatedRmsNorm::DEFAULT_EPS,
        /// When the gate is applied; before the norm by default.
        order: GateOrder = GateOrder::default(),
        /// How many neighbours of the last axis are normalized together; all by default.
        group_size: Option<i32> = None,
    }
}

/// [`gated_rms_norm`] with a trainable weight that starts at one.
///
/// # Shapes
/// `[..., D]`, twice, to `[..., D]`.
///
/// # Example
/// ```
/// use mlx_primitives::norm::GatedRmsNorm;
/// use mlx_rs::{Array, module::Module};
///
/// let mut norm = GatedRmsNorm::new(64)?;
/// let (x, gate) = (Array::ones::<f32>(&[2, 10, 64])?, Array::zeros::<f32>(&[2, 10, 64])?);
/// let y = norm.forward((&x, &gate))?;
/// assert_eq!(y.shape(), [2, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct GatedRmsNorm {
    /// `[D]`.
    #[param]
    pub weight: Param<Array>,
    /// Added to the mean square.
    pub eps: f32,
    /// When the gate is applied.
    pub order: GateOrder,
    /// How many neighbours of the last axis are normalized together, if not all.
    pub group_size: Option<i32>,
}

/// Input of [`GatedRmsNorm`].
#[derive(Debug, Clone, Copy)]
pub struct GatedRmsNormInput<'a> {
    /// `[..., D]`.
    pub x: &'a Array,
    /// Of the shape and dtype of `x`.
    pub gate: &'a Array,
}

impl<'a> From<(&'a Array, &'a Array)> for GatedRmsNormInput<'a> {
    fn from((x, gate): (&'a Array, &'a Array)) -> Self {
        Self { x, gate }
    }
}

impl<'a> From<&'a Array> for GatedRmsNormInput<'a> {
    /// An array that gates itself.
    fn from(x: &'a Array) -> Self {
        Self { x, gate: x }
    }
}

impl GatedRmsNorm {
    /// The default of [`GatedRmsNormBuilder::eps`].
    pub const DEFAULT_EPS: f32 = GatedRmsNormOptions::DEFAULT_EPS;

    /// A norm over a last axis of `dims` elements, gated before.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(GatedRmsNormBuilder::new(dims))
    }

    fn assemble(builder: GatedRmsNormBuilder) -> Result<Self> {
        let GatedRmsNormBuilder { dims, eps, order, group_size } = builder;
        let check = Check::op("GatedRmsNorm");
        check.at_least("dims", dims, 1)?;
        check.non_negative("eps", eps)?;
        let size = group_size.unwrap_or(dims);
        let divides = size >= 1 && dims % size == 0;
        check.value(divides, "group_size", format_args!("divide {dims}"), size)?;
        Ok(Self { weight: Param::new(ones::<f32>(&[dims])?), eps, order, group_size })
    }
}

impl<'a, I: Into<GatedRmsNormInput<'a>>> Module<I> for GatedRmsNorm {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let GatedRmsNormInput { x, gate } = input.into();
        let (eps, order, group_size) = (self.eps, self.order, self.group_size);
        let options = GatedRmsNormOptions { eps, order, group_size, ..Default::default() };
        Ok(gated_rms_norm(x, gate, &*self.weight, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
