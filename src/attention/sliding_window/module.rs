//! The layer: [`sliding_window_attention`] with its options fixed.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{SlidingWindowOptions, sliding_window_attention};
use crate::{builder::builder, check::Check, error::Result, layout::Layout};

const CHECK: Check = Check::op("SlidingWindowAttention");

builder! {
    /// Builder for [`SlidingWindowAttention`].
    SlidingWindowAttentionBuilder => SlidingWindowAttention (
        /// Query heads.
        num_heads: i32,
        /// The size of a query and of a key.
        head_dim: i32,
        /// How many keys a query sees before its own.
        window_size: i32,
    ) {
        /// Key and value heads; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// See [`SlidingWindowOptions::causal`]; on by default.
        causal: bool = true,
        /// See [`SlidingWindowOptions::scale`]; `1 / sqrt(head_dim)` by default.
        scale: Option<f32> = None,
        /// The order of the axes; [`Layout::Bshd`] by default.
        layout: Layout = Layout::Bshd,
    }
}

/// [`sliding_window_attention`] between heads of fixed number and size. It has no parameters.
///
/// The keys may be those of a cache that drops what the window has left behind.
///
/// # Shapes
/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`.
///
/// # Example
/// ```
/// use mlx_primitives::attention::SlidingWindowAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = SlidingWindowAttention::new(8, 64, 127)?;
/// let x = Array::ones::<f32>(&[1, 300, 8, 64])?;
/// assert_eq!(attention.forward((&x, &x, &x))?.shape(), [1, 300, 8, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct SlidingWindowAttention {
    /// Query heads.
    pub num_heads: i32,
    /// The size of a query and of a key.
    pub head_dim: i32,
    /// How many keys a query sees before its own.
    pub window_size: i32,
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// See [`SlidingWindowOptions::causal`].
    pub causal: bool,
    /// See [`SlidingWindowOptions::scale`].
    pub scale: Option<f32>,
    /// The order of the axes.
    pub layout: Layout,
}

impl SlidingWindowAttention {
    /// Causal attention between `num_heads` heads of `head_dim` elements on each side.
    ///
    /// # Errors
    /// When the number or the size of the heads is below one, or `window_size` is negative.
    pub fn new(num_heads: i32, head_dim: i32, window_size: i32) -> Result<Self> {
        Self::assemble(SlidingWindowAttentionBuilder::new(num_heads, head_dim, window_size))
    }

    fn assemble(builder: SlidingWindowAttentionBuilder) -> Result<Self> {
        let SlidingWindowAttentionBuilder { num_heads, head_dim, window_size, .. } = builder;
        let num_kv_heads = builder.num_kv_heads.unwrap_or(num_heads);
        CHECK.heads(num_heads, num_kv_heads, head_dim)?;
        CHECK.at_least("window_size", window_size, 0)?;
        CHECK.finite("scale", builder.scale.unwrap_or(1.0))?;
        let SlidingWindowAttentionBuilder { causal, scale, layout, .. } = builder;
        Ok(Self { num_heads, head_dim, window_size, num_kv_heads, causal, scale, layout })
    }
}

impl<'a> Module<(&'a Array, &'a Array, &'a Array)> for SlidingWindowAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(
        &mut self,
        (queries, keys, values): (&'a Array, &'a Array, &'a Array),
    ) -> Result<Array, Exception> {
        let &mut Self { num_heads, head_dim, num_kv_heads, causal, scale, layout, .. } = self;
        CHECK.shape("queries", queries, &layout.axes("B", "S_q", num_heads, head_dim))?;
        CHECK.shape("keys", keys, &layout.axes("B", "S_kv", num_kv_heads, head_dim))?;
        let options = SlidingWindowOptions { scale, causal, layout, ..Default::default() };
        Ok(sliding_window_attention(queries, keys, values, self.window_size, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
