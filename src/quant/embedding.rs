//! A table of packed rows, read by id or multiplied by as an output head.

use mlx_rs::{Array, Dtype, error::Exception, macros::ModuleParameters, module::Module};

use super::{QuantizedCompute, QuantizedWeight, compute::Multiplier, frozen::Frozen};
use crate::{builder::builder, check::Check, error::Result};

builder! {
    /// Builder for [`QuantizedEmbedding`].
    QuantizedEmbeddingBuilder => QuantizedEmbedding (
        /// The packed table, `[V, D]`.
        weight: QuantizedWeight,
    ) {
        /// What [`QuantizedEmbedding::as_linear`] multiplies with; [`QuantizedCompute::Auto`] by
        /// default.
        compute: QuantizedCompute = QuantizedCompute::Auto,
        /// The dtype of the copy that [`QuantizedCompute::Dense`] keeps, and of its product; f32 by
        /// default, the only one that BLAS is fast in on a CPU.
        dense_dtype: Dtype = Dtype::Float32,
    }
}

/// Looks rows up in a packed table that is never trained, unpacking these alone.
///
/// Its parameters are named `weight`, `scales` and `biases`, and stay frozen.
///
/// # Shapes
/// Integers `[...]` to `[..., D]` in the dtype of the scales. An id that names no row gives a row
/// of NaN: the lookup is lazy, so that it cannot refuse one.
///
/// # Memory
/// [`as_linear`](Self::as_linear) keeps an unpacked copy on a CPU, made by its first call: see
/// [`QuantizedCompute`]. The lookup never does.
///
/// # Example
/// ```
/// use mlx_primitives::quant::{QuantizedEmbedding, QuantizedWeight};
/// use mlx_rs::{Array, array, module::Module};
///
/// let table = QuantizedWeight::quantize(&Array::ones::<f32>(&[100, 64])?, 64, 4)?;
/// let mut embedding = QuantizedEmbedding::from_weight(table)?;
/// let x = embedding.forward(&array!([[1, 2, 99]]))?;
/// assert_eq!(x.shape(), [1, 3, 64]);
/// assert_eq!(embedding.as_linear(&x)?.shape(), [1, 3, 100]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct QuantizedEmbedding {
    #[param]
    weight: Frozen,
    #[param]
    scales: Frozen,
    #[param]
    biases: Frozen,
    group_size: i32,
    bits: i32,
    multiplier: Multiplier,
}

impl QuantizedEmbedding {
    /// A table whose product suits the current device.
    ///
    /// # Errors
    /// When MLX cannot name the device.
    pub fn from_weight(weight: QuantizedWeight) -> Result<Self> {
        Self::assemble(QuantizedEmbeddingBuilder::new(weight))
    }

    fn assemble(builder: QuantizedEmbeddingBuilder) -> Result<Self> {
        let check = Check::op("QuantizedEmbedding");
        let QuantizedWeight { weight, scales, biases, group_size, bits } = builder.weight;
        Ok(Self {
            weight: Frozen::new(weight),
            scales: Frozen::new(scales),
            biases: Frozen::new(biases),
            group_size,
            bits,
            multiplier: Multiplier::new(check, builder.compute, builder.dense_dtype)?,
        })
    }

    /// Multiplies by the table, `[..., D]` to `[..., V]`: the output head of a model whose input
    /// and output embeddings are one.
    ///
    /// # Errors
    /// When the last axis of `x` is not `D`, or `x` is not floating point.
    pub fn as_linear(&mut self, x: impl AsRef<Array>) -> Result<Array> {
        let (weight, loans) = (self.weight()?, self.loans());
        self.multiplier.linear(x.as_ref(), &weight, loans, None)
    }

    /// The packed table as it stands.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into it.
    pub fn weight(&self) -> Result<QuantizedWeight> {
        let parts = [&self.weight, &self.scales, &self.biases].map(|part| part.value().clone());
        QuantizedWeight::from_parts(parts.into(), self.group_size, self.bits)
    }

    /// What [`as_linear`](Self::as_linear) multiplies with, settled: never
    /// [`QuantizedCompute::Auto`].
    pub fn compute(&self) -> QuantizedCompute {
        self.multiplier.compute()
    }

    /// The unpacked copy, `[V, D]`, where one is kept; made now if it was not yet.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into the table.
    pub fn dense_copy(&mut self) -> Result<Option<&Array>> {
        let (weight, loans) = (self.weight()?, self.loans());
        self.multiplier.dense(&weight, loans)
    }

    /// The bytes held once [`as_linear`](Self::as_linear) has run: the parameters and the unpacked
    /// copy, if any.
    ///
    /// # Errors
    /// When arrays of other shapes were loaded into the table.
    pub fn nbytes(&self) -> Result<usize> {
        let weight = self.weight()?;
        Ok(weight.nbytes() + self.multiplier.nbytes(weight.shape()))
    }

    fn loans(&self) -> u64 {
        self.weight.loans() + self.scales.loans() + self.biases.loans()
    }
}

impl Module<&Array> for QuantizedEmbedding {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, ids: &Array) -> Result<Array, Exception> {
        Ok(self.weight()?.rows(ids)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
