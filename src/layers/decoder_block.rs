//! The pre-norm decoder block.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{Attention, AttentionInput, GatedFeedForward};
use crate::{
    builder::builder,
    error::Result,
    norm::{RmsNorm, RmsNormBuilder},
};

builder! {
    /// Builder for [`DecoderBlock`].
    DecoderBlockBuilder => DecoderBlock (
        /// The size of the last axis.
        dims: i32,
        /// The attention half.
        attention: Attention,
        /// The feed-forward half.
        feed_forward: GatedFeedForward,
    ) {
        /// Added to the mean square in both norms; [`RmsNorm::DEFAULT_EPS`] by default.
        norm_eps: f32 = RmsNorm::DEFAULT_EPS,
    }
}

/// `h = x + attention(norm(x))`, then `h + feed_forward(norm(h))`.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::{Attention, DecoderBlock, GatedFeedForward};
/// use mlx_rs::{Array, module::Module};
///
/// let (attention, feed_forward) = (Attention::new(64, 4)?, GatedFeedForward::new(64, 172)?);
/// let mut block = DecoderBlock::new(64, attention, feed_forward)?;
/// assert_eq!(block.forward(&Array::ones::<f32>(&[1, 10, 64])?)?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Xiong et al., [On Layer Normalization in the Transformer
/// Architecture](https://arxiv.org/abs/2002.04745), 2020.
#[derive(Debug, Clone, ModuleParameters)]
pub struct DecoderBlock {
    /// Normalizes what attention reads.
    #[param]
    pub attention_norm: RmsNorm,
    /// The attention half.
    #[param]
    pub attention: Attention,
    /// Normalizes what the feed-forward half reads.
    #[param]
    pub feed_forward_norm: RmsNorm,
    /// The feed-forward half.
    #[param]
    pub feed_forward: GatedFeedForward,
}

impl DecoderBlock {
    /// A block over a last axis of `dims` elements.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32, attention: Attention, feed_forward: GatedFeedForward) -> Result<Self> {
        Self::assemble(DecoderBlockBuilder::new(dims, attention, feed_forward))
    }

    fn assemble(builder: DecoderBlockBuilder) -> Result<Self> {
        use mlx_rs::builder::Builder;
        let norm = || RmsNormBuilder::new(builder.dims).eps(builder.norm_eps).build();
        Ok(Self {
            attention_norm: norm()?,
            feed_forward_norm: norm()?,
            attention: builder.attention,
            feed_forward: builder.feed_forward,
        })
    }

    /// Prepares both halves: see [`Attention::prepare_for_inference`] and [`GatedFeedForward::prepare_for_inference`].
    ///
    /// # Errors
    /// When MLX fails.
    pub fn prepare_for_inference(&mut self) -> Result<()> {
        self.attention.prepare_for_inference()?;
        self.feed_forward.prepare_for_inference()
    }
}

impl<'a, I: Into<AttentionInput<'a>>> Module<I> for DecoderBlock {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let AttentionInput { x, mask, cache } = input.into();
        let order = self.attention.order(x)?;
        let rows = x.flatten(0, 1)?;
        let normed = self.attention_norm.forward(&rows)?;
        let h = rows.add(self.attention.attend(&normed, order, mask, cache)?)?;
        let fed = self.feed_forward.forward(&self.feed_forward_norm.forward(&h)?)?;
        h.add(fed)?.reshape(x.shape())
    }

    fn training_mode(&mut self, mode: bool) {
        Module::<&Array>::training_mode(&mut self.attention, mode);
        self.feed_forward.training_mode(mode);
    }
}
