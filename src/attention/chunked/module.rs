//! The layer: [`chunked_cross_attention`] with its options fixed.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{ChunkedCrossAttentionOptions, chunked_cross_attention};
use crate::{builder::builder, check::Check, error::Result, layout::Layout};

const CHECK: Check = Check::op("ChunkedCrossAttention");

builder! {
    /// Builder for [`ChunkedCrossAttention`].
    ChunkedCrossAttentionBuilder => ChunkedCrossAttention (
        /// Query heads.
        num_heads: i32,
        /// The size of a query and of a key.
        head_dim: i32,
    ) {
        /// See [`ChunkedCrossAttentionOptions::chunk_size`]; 1024 by default.
        chunk_size: i32 = ChunkedCrossAttentionOptions::DEFAULT_CHUNK_SIZE,
        /// Key and value heads; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// See [`ChunkedCrossAttentionOptions::causal`]; off by default.
        causal: bool = false,
        /// See [`ChunkedCrossAttentionOptions::scale`]; `1 / sqrt(head_dim)` by default.
        scale: Option<f32> = None,
        /// The order of the axes; [`Layout::Bshd`] by default.
        layout: Layout = Layout::Bshd,
    }
}

/// [`chunked_cross_attention`] between heads of fixed number and size. It has no parameters.
///
/// # Shapes
/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`.
///
/// # Example
/// ```
/// use mlx_primitives::attention::ChunkedCrossAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = ChunkedCrossAttention::new(8, 64)?;
/// let queries = Array::ones::<f32>(&[1, 3, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 3000, 8, 64])?;
/// assert_eq!(attention.forward((&queries, &keys, &keys))?.shape(), [1, 3, 8, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct ChunkedCrossAttention {
    /// Query heads.
    pub num_heads: i32,
    /// The size of a query and of a key.
    pub head_dim: i32,
    /// See [`ChunkedCrossAttentionOptions::chunk_size`].
    pub chunk_size: i32,
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// See [`ChunkedCrossAttentionOptions::causal`].
    pub causal: bool,
    /// See [`ChunkedCrossAttentionOptions::scale`].
    pub scale: Option<f32>,
    /// The order of the axes.
    pub layout: Layout,
}

impl ChunkedCrossAttention {
    /// Attention that sees every key, between `num_heads` heads of `head_dim` elements on each side.
    ///
    /// # Errors
    /// When a number is below one.
    pub fn new(num_heads: i32, head_dim: i32) -> Result<Self> {
        Self::assemble(ChunkedCrossAttentionBuilder::new(num_heads, head_dim))
    }

    fn assemble(builder: ChunkedCrossAttentionBuilder) -> Result<Self> {
        let ChunkedCrossAttentionBuilder { num_heads, head_dim, chunk_size, .. } = builder;
        let num_kv_heads = builder.num_kv_heads.unwrap_or(num_heads);
        CHECK.heads(num_heads, num_kv_heads, head_dim)?;
        CHECK.at_least("chunk_size", chunk_size, 1)?;
        CHECK.finite("scale", builder.scale.unwrap_or(1.0))?;
        let ChunkedCrossAttentionBuilder { causal, scale, layout, .. } = builder;
        Ok(Self { num_heads, head_dim, chunk_size, num_kv_heads, causal, scale, layout })
    }
}

impl<'a> Module<(&'a Array, &'a Array, &'a Array)> for ChunkedCrossAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(
        &mut self,
        (queries, keys, values): (&'a Array, &'a Array, &'a Array),
    ) -> Result<Array, Exception> {
        let &mut Self { num_heads, head_dim, chunk_size, num_kv_heads, causal, scale, layout } =
            self;
        CHECK.shape("queries", queries, &layout.axes("B", "S_q", num_heads, head_dim))?;
        CHECK.shape("keys", keys, &layout.axes("B", "S_kv", num_kv_heads, head_dim))?;
        let options = ChunkedCrossAttentionOptions {
            chunk_size,
            scale,
            causal,
            layout,
            ..Default::default()
        };
        Ok(chunked_cross_attention(queries, keys, values, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
