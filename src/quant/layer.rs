//! The layer: a packed weight, a bias and their product.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param, Parameter},
};

use super::{QuantizedCompute, QuantizedWeight, compute::Multiplier, frozen::Frozen};
use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
};

builder! {
    /// Builder for [`QuantizedLinear`].
    QuantizedLinearBuilder => QuantizedLinear (
        /// The packed weight, `[O, I]`.
        weight: QuantizedWeight,
    ) {
        /// Added to the product, `[O]`; none by default.
        bias: Option<Array> = None,
        /// What the layer multiplies with; [`QuantizedCompute::Auto`] by default.
        compute: QuantizedCompute = QuantizedCompute::Auto,
        /// The dtype of the copy that [`QuantizedCompute::Dense`] keeps, and of its product; f32 by
        /// default, the only one that BLAS is fast in on a CPU.
        dense_dtype: Dtype = Dtype::Float32,
    }
}

/// [`quantized_linear`](super::quantized_linear) with a packed weight that is never trained.
///
/// Its parameters are named `weight`, `scales`, `biases` and, if there is one, `bias`. All are
/// frozen, as the base of a low-rank adapter should be; `unfreeze_parameters` makes the bias alone
/// trainable.
///
/// # Shapes
/// `[..., I]` to `[..., O]`.
///
/// # Memory
/// On a CPU the layer keeps an unpacked copy: see [`QuantizedCompute`]. A compiled function that
/// is the first to call the layer makes that copy in every call: evaluate
/// [`dense_copy`](Self::dense_copy) before.
///
/// # Example
/// ```
/// use mlx_primitives::quant::{QuantizedLinear, QuantizedWeight};
/// use mlx_rs::{Array, module::Module};
///
/// let weight = QuantizedWeight::quantize(&Array::ones::<f32>(&[8, 64])?, 64, 4)?;
/// let mut layer = QuantizedLinear::from_weight(weight)?;
/// let y = layer.forward(&Array::ones::<f32>(&[2, 10, 64])?)?;
/// assert_eq!(y.shape(), [2, 10, 8]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct QuantizedLinear {
    #[param]
    weight: Frozen,
    #[param]
    scales: Frozen,
    #[param]
    biases: Frozen,
    /// `[O]`; frozen at first.
    #[param]
    pub bias: Param<Option<Array>>,
    group_size: i32,
    bits: i32,
    multiplier: Multiplier,
}

impl QuantizedLinear {
    /// A layer without a bias, multiplying as suits the current device.
    ///
    /// # Errors
    /// When MLX cannot name the device.
    pub fn from_weight(weight: QuantizedWeight) -> Result<Self> {
        Self::assemble(QuantizedLinearBuilder::new(weight))
    }

    fn assemble(builder: QuantizedLinearBuilder) -> Result<Self> {
        let check = Check::op("QuantizedLinear");
        if let Some(bias) = &builder.bias {
            check.floating("bias", bias)?;
            check.shape("bias", bias, axes![builder.weight.shape()[0]])?;
        }
        let mut bias = Param::new(builder.bias);
        bias.freeze(false);
        let QuantizedWeight { weight, scales, biases, group_size, bits } = builder.weight;
        Ok(Self {
            weight: Frozen::new(weight),
            scales: Frozen::new(scales),
            biases: Frozen::new(biases),
            bias,
            group_size,
            bits,
            multiplier: Multiplier::new(check, builder.compute, builder.dense_dtype)?,
        })
    }

    /// The packed weight as it stands.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into the layer.
    pub fn weight(&self) -> Result<QuantizedWeight> {
        let parts = [&self.weight, &self.scales, &self.biases].map(|part| part.value().clone());
        QuantizedWeight::from_parts(parts.into(), self.group_size, self.bits)
    }

    /// What the layer multiplies with, settled: never [`QuantizedCompute::Auto`].
    pub fn compute(&self) -> QuantizedCompute {
        self.multiplier.compute()
    }

    /// The unpacked copy, `[O, I]`, where one is kept; made now if it was not yet.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into the layer.
    pub fn dense_copy(&mut self) -> Result<Option<&Array>> {
        let (weight, loans) = (self.weight()?, self.loans());
        self.multiplier.dense(&weight, loans)
    }

    /// The bytes the layer holds once it has run: its parameters and the unpacked copy, if any.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into the layer.
    pub fn nbytes(&self) -> Result<usize> {
        let weight = self.weight()?;
        let bias = self.bias.as_ref().as_ref().map_or(0, Array::nbytes);
        Ok(weight.nbytes() + bias + self.multiplier.nbytes(weight.shape()))
    }

    /// Whether the numbers of both mean the same, and are multiplied in the same way.
    pub(crate) fn is_packed_like(&self, other: &Self) -> bool {
        let of = |layer: &Self| (layer.group_size, layer.bits, layer.multiplier.way());
        of(self) == of(other)
    }

    fn loans(&self) -> u64 {
        self.weight.loans() + self.scales.loans() + self.biases.loans()
    }
}

impl Module<&Array> for QuantizedLinear {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let (weight, loans) = (self.weight()?, self.loans());
        Ok(self.multiplier.linear(x, &weight, loans, self.bias.value.as_ref())?)
    }

    fn training_mode(&mut self, _: bool) {}
}
