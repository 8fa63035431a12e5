//! Rotary position embedding and attention in one call.

mod module;

pub use module::{FusedRopeAttention, FusedRopeAttentionBuilder, FusedRopeAttentionInput};

use mlx_rs::Array;

use super::flash::{FlashAttentionOptions, flash_attention};
use crate::{
    error::Result,
    rope::{RopeOffset, RopeOptions, rope_qk},
};

/// Options of [`fused_rope_attention`].
#[derive(Debug, Clone, Default)]
pub struct FusedRopeAttentionOptions<'a> {
    /// How queries and keys are rotated. Its layout is that of `attention`.
    pub rope: RopeOptions,
    /// How rotated queries attend to rotated keys.
    pub attention: FlashAttentionOptions<'a>,
}

/// Rotates queries and keys by their positions, then attends.
///
/// [`flash_attention`] of what [`rope_qk`] returns. [`FusedRopeAttention`] does it with a cache of keys, each
/// rotated once.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`](crate::Layout::Bhsd) swaps the axes of sequence and heads.
/// - `queries`: `[B, S, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`
/// - `values`: `[B, S, H_kv, D_v]`, the same dtype
/// - `offset`: a number, or `[B]`, int32: the position where each row starts
/// - result: `[B, S, H, D_v]`, the same dtype
///
/// # Errors
/// Those of [`rope_qk`] and [`flash_attention`], under their names.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, FusedRopeAttentionOptions, fused_rope_attention};
/// use mlx_rs::Array;
///
/// let (queries, keys) = (Array::ones::<f32>(&[1, 10, 8, 64])?, Array::ones::<f32>(&[1, 10, 2, 64])?);
/// let attention = FlashAttentionOptions { causal: true, ..Default::default() };
/// let options = FusedRopeAttentionOptions { attention, ..Default::default() };
/// let y = fused_rope_attention((&queries, &keys, &keys), 0, options)?;
/// assert!(y.all_close(&queries, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Those of [`rope_qk`] and [`flash_attention`], one after the other: the rotation takes one pass over queries and
/// keys, against as many over the keys as there are blocks of queries if each rotated them again.
///
/// Su et al., [RoFormer: Enhanced Transformer with Rotary Position
/// Embedding](https://arxiv.org/abs/2104.09864), 2021.
pub fn fused_rope_attention<'a>(
    (queries, keys, values): (impl AsRef<Array>, impl AsRef<Array>, impl AsRef<Array>),
    offset: impl Into<RopeOffset<'a>>,
    options: FusedRopeAttentionOptions<'_>,
) -> Result<Array> {
    let FusedRopeAttentionOptions { rope, attention } = options;
    let rope = RopeOptions { layout: attention.layout, ..rope };
    let (queries, keys) = rope_qk(queries, keys, offset, rope)?;
    flash_attention(queries, keys, values, attention)
}
