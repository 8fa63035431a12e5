//! The layer: an optional weight, an optional bias and [`layer_norm`].

use mlx_rs::{
    Array,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::{ones, zeros},
};

use super::{LayerNormOptions, layer_norm};
use crate::{builder::builder, check::Check, error::Result};

builder! {
    /// Builder for [`LayerNorm`].
    LayerNormBuilder => LayerNorm (
        /// The size of the last axis.
        dims: i32,
    ) {
        /// Added to the variance; [`LayerNorm::DEFAULT_EPS`] by default.
        eps: f32 = LayerNorm::DEFAULT_EPS,
        /// Whether there is a weight, and so possibly a bias; `true` by default.
        affine: bool = true,
        /// Whether an affine norm has a bias beside its weight; `true` by default.
        bias: bool = true,
    }
}

/// [`layer_norm`] with a trainable weight that starts at one and a trainable bias that starts at zero.
///
/// # Shapes
/// `[..., D]` to `[..., D]`.
///
/// # Example
/// ```
/// use mlx_primitives::norm::LayerNormBuilder;
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut norm = LayerNormBuilder::new(64).bias(false).build()?;
/// let y = norm.forward(&Array::ones::<f32>(&[2, 10, 64])?)?;
/// assert_eq!(y.shape(), [2, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct LayerNorm {
    /// `[D]`, in an affine norm.
    #[param]
    pub weight: Param<Option<Array>>,
    /// `[D]`, in an affine norm with a bias.
    #[param]
    pub bias: Param<Option<Array>>,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// The default of [`LayerNormBuilder::eps`].
    pub const DEFAULT_EPS: f32 = LayerNormOptions::DEFAULT_EPS;

    /// An affine norm with a bias, over a last axis of `dims` elements.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(LayerNormBuilder::new(dims))
    }

    fn assemble(builder: LayerNormBuilder) -> Result<Self> {
        let check = Check::op("LayerNorm");
        check.at_least("dims", builder.dims, 1)?;
        check.non_negative("eps", builder.eps)?;
        let shape = [builder.dims];
        let weight = builder.affine.then(|| ones::<f32>(&shape)).transpose()?;
        let bias = (builder.affine && builder.bias).then(|| zeros::<f32>(&shape)).transpose()?;
        Ok(Self { weight: Param::new(weight), bias: Param::new(bias), eps: builder.eps })
    }
}

impl Module<&Array> for LayerNorm {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let options = LayerNormOptions { eps: self.eps, ..Default::default() };
        Ok(layer_norm(x, &*self.weight, &*self.bias, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
