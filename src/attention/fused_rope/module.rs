//! The layer: rotation, a cache, attention.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use crate::{
    attention::{
        KvCache,
        flash::{FlashAttentionOptions, flash_attention},
    },
    builder::builder,
    check::Check,
    error::Result,
    layout::Layout,
    rope::Rope,
};

const CHECK: Check = Check::op("FusedRopeAttention");

builder! {
    /// Builder for [`FusedRopeAttention`].
    FusedRopeAttentionBuilder => FusedRopeAttention (
        /// Query heads.
        num_heads: i32,
        /// The size of a query and of a key.
        head_dim: i32,
    ) {
        /// Key and value heads; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// How queries and keys are rotated; all of a head, with the default base, by default.
        rope: Option<Rope> = None,
        /// See [`FlashAttentionOptions::causal`]; on by default.
        causal: bool = true,
        /// See [`FlashAttentionOptions::scale`]; `1 / sqrt(head_dim)` by default.
        scale: Option<f32> = None,
        /// The order of the axes; [`Layout::Bshd`] by default.
        layout: Layout = Layout::Bshd,
    }
}

/// Input of [`FusedRopeAttention`].
#[derive(Debug)]
pub struct FusedRopeAttentionInput<'a> {
    /// `[B, S, H, D]`.
    pub queries: &'a Array,
    /// `[B, S, H_kv, D]`, of the same tokens.
    pub keys: &'a Array,
    /// `[B, S, H_kv, D_v]`.
    pub values: &'a Array,
    /// Boolean or additive, broadcastable to `[B, H, S, S_kv]`; on top of `causal`.
    pub mask: Option<&'a Array>,
    /// Rotated keys, and values, of earlier tokens; this call appends its own. It says what the first position is, which
    /// is 0 without a cache.
    pub cache: Option<&'a mut dyn KvCache>,
}

impl<'a> From<(&'a Array, &'a Array, &'a Array)> for FusedRopeAttentionInput<'a> {
    fn from((queries, keys, values): (&'a Array, &'a Array, &'a Array)) -> Self {
        Self { queries, keys, values, mask: None, cache: None }
    }
}

impl<'a, C: KvCache> From<(&'a Array, &'a Array, &'a Array, &'a mut C)>
    for FusedRopeAttentionInput<'a>
{
    fn from((queries, keys, values, cache): (&'a Array, &'a Array, &'a Array, &'a mut C)) -> Self {
        Self { queries, keys, values, mask: None, cache: Some(cache) }
    }
}

/// [`fused_rope_attention`](super::fused_rope_attention) between heads of fixed number and size, which may go
/// on where a cache ends. It has no parameters.
///
/// # Shapes
/// `[B, S, H, D]`, `[B, S, H_kv, D]` and `[B, S, H_kv, D_v]` to `[B, S, H, D_v]`.
///
/// # Example
/// ```
/// use mlx_primitives::{attention::FusedRopeAttention, cache::SimpleKvCache};
/// use mlx_rs::{Array, module::Module};
///
/// let (mut attention, mut cache) = (FusedRopeAttention::new(8, 64)?, SimpleKvCache::new());
/// let prompt = Array::ones::<f32>(&[1, 10, 8, 64])?;
/// attention.forward((&prompt, &prompt, &prompt, &mut cache))?;
/// let token = Array::ones::<f32>(&[1, 1, 8, 64])?;
/// let y = attention.forward((&token, &token, &token, &mut cache))?;
/// assert_eq!(y.shape(), [1, 1, 8, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct FusedRopeAttention {
    /// Query heads.
    pub num_heads: i32,
    /// The size of a query and of a key.
    pub head_dim: i32,
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// How queries and keys are rotated.
    pub rope: Rope,
    /// See [`FlashAttentionOptions::causal`].
    pub causal: bool,
    /// See [`FlashAttentionOptions::scale`].
    pub scale: Option<f32>,
    /// The order of the axes.
    pub layout: Layout,
}

impl FusedRopeAttention {
    /// Causal attention between `num_heads` heads of `head_dim` elements on each side, all of which are rotated.
    ///
    /// # Errors
    /// When a number is below one, or `head_dim` is odd.
    pub fn new(num_heads: i32, head_dim: i32) -> Result<Self> {
        Self::assemble(FusedRopeAttentionBuilder::new(num_heads, head_dim))
    }

    fn assemble(builder: FusedRopeAttentionBuilder) -> Result<Self> {
        let FusedRopeAttentionBuilder { num_heads, head_dim, causal, scale, layout, .. } = builder;
        let num_kv_heads = builder.num_kv_heads.unwrap_or(num_heads);
        CHECK.heads(num_heads, num_kv_heads, head_dim)?;
        CHECK.finite("scale", scale.unwrap_or(1.0))?;
        let rope = builder.rope.map_or_else(|| Rope::new(head_dim), Ok)?;
        let expected = format_args!("turn at most D = {head_dim} elements");
        CHECK.value(rope.dims() <= head_dim, "rope", expected, rope.dims())?;
        Ok(Self { num_heads, head_dim, num_kv_heads, rope, causal, scale, layout })
    }

    /// Refuses tokens that do not fit these heads, or each other.
    fn check(&self, input: &FusedRopeAttentionInput) -> Result<()> {
        let &Self { num_heads, head_dim, num_kv_heads, layout, .. } = self;
        let FusedRopeAttentionInput { queries, keys, values, .. } = input;
        let dtype = CHECK.floating("queries", queries)?;
        CHECK.shape("queries", queries, &layout.axes("B", "S", num_heads, head_dim))?;
        let [batch, tokens, ..] = layout.dims(queries);
        CHECK.dtype_among("keys", keys, &[dtype])?;
        CHECK.shape("keys", keys, &layout.axes(batch, tokens, num_kv_heads, head_dim))?;
        CHECK.dtype_among("values", values, &[dtype])?;
        CHECK.shape("values", values, &layout.axes(batch, tokens, num_kv_heads, "D_v"))
    }
}

impl<'a, Input> Module<Input> for FusedRopeAttention
where
    Input: Into<FusedRopeAttentionInput<'a>>,
{
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: Input) -> Result<Array, Exception> {
        let input = input.into();
        self.check(&input)?;
        let FusedRopeAttentionInput { queries, keys, values, mask, cache } = input;
        let &mut Self { causal, scale, layout, .. } = self;
        let options = FlashAttentionOptions { scale, causal, mask, layout, ..Default::default() };
        if let Some(cache) = cache {
            let rope = self.rope.options_for(layout, queries, cache.offset())?;
            return Ok(cache.attend_with_rope(queries, keys, values, rope, options)?);
        }
        let (queries, keys) = self.rope.rotate_in(layout, queries, keys, 0.into())?;
        Ok(flash_attention(queries, keys, values, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
