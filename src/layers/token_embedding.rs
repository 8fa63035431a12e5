//! Token embeddings that may also be the output head.

use mlx_rs::{Array, error::Exception, module::Module, nn};

use super::parameters_of_variants;
use crate::{
    check::{Check, axes},
    error::Result,
    ids,
    quant::QuantizedEmbedding,
};

const CHECK: Check = Check::op("TokenEmbedding");

/// One row per token: looked up on the way in and, when tied, multiplied with on the way out.
///
/// # Shapes
/// - [`Module::forward`]: integer ids `[...]` to `[..., D]`; an id that is no token gives a row of NaN
/// - [`TokenEmbedding::as_linear`]: `[..., D]` to logits `[..., V]`
///
/// # Example
/// ```
/// use mlx_primitives::layers::TokenEmbedding;
/// use mlx_rs::{Array, module::Module, nn};
///
/// let mut embedding = TokenEmbedding::from(nn::Embedding::new(100, 8)?);
/// let x = embedding.forward(&Array::from_slice(&[1, 5, 7], &[1, 3]))?;
/// assert_eq!(embedding.as_linear(&x)?.shape(), [1, 3, 100]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum TokenEmbedding {
    /// mlx-rs's embedding.
    Dense(nn::Embedding),
    /// An embedding over packed rows.
    Quantized(QuantizedEmbedding),
}

parameters_of_variants!(TokenEmbedding { Dense, Quantized });

impl TokenEmbedding {
    /// Multiplies with the transposed rows: the output head of a model whose embeddings are tied.
    ///
    /// # Errors
    /// When the last axis of `x` is not `D`.
    pub fn as_linear(&mut self, x: impl AsRef<Array>) -> Result<Array> {
        let x = x.as_ref();
        match self {
            Self::Dense(embedding) => {
                CHECK.last_axis_is("x", x, checked_table(embedding)?.dim(1))?;
                Ok(embedding.as_linear(x)?)
            }
            Self::Quantized(embedding) => embedding.as_linear(x),
        }
    }
}

/// The table, `[V, D]`, which a caller may have replaced.
fn checked_table(embedding: &nn::Embedding) -> Result<&Array> {
    CHECK.floating("weight", &embedding.weight)?;
    CHECK.shape("weight", &embedding.weight, axes!["V", "D"])?;
    Ok(&embedding.weight)
}

impl From<nn::Embedding> for TokenEmbedding {
    fn from(embedding: nn::Embedding) -> Self {
        Self::Dense(embedding)
    }
}

impl From<QuantizedEmbedding> for TokenEmbedding {
    fn from(embedding: QuantizedEmbedding) -> Self {
        Self::Quantized(embedding)
    }
}

impl Module<&Array> for TokenEmbedding {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, ids: &Array) -> Result<Array, Exception> {
        CHECK.integer("ids", ids)?;
        match self {
            Self::Dense(embedding) => ids::rows(checked_table(embedding)?, ids),
            Self::Quantized(embedding) => embedding.forward(ids),
        }
    }

    fn training_mode(&mut self, mode: bool) {
        match self {
            Self::Dense(embedding) => embedding.training_mode(mode),
            Self::Quantized(embedding) => embedding.training_mode(mode),
        }
    }
}
