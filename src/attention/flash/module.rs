//! The layer: [`flash_attention`] with its options fixed.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{FlashAttentionOptions, Window, flash_attention};
use crate::{builder::builder, check::Check, error::Result, layout::Layout};

const CHECK: Check = Check::op("FlashAttention");

builder! {
    /// Builder for [`FlashAttention`].
    FlashAttentionBuilder => FlashAttention (
        /// Query heads.
        num_heads: i32,
        /// The size of a query and of a key.
        head_dim: i32,
    ) {
        /// Key and value heads; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// See [`FlashAttentionOptions::causal`]; off by default.
        causal: bool = false,
        /// See [`FlashAttentionOptions::scale`]; `1 / sqrt(head_dim)` by default.
        scale: Option<f32> = None,
        /// See [`FlashAttentionOptions::window`]; without end by default.
        window: Window = Window { left: None, right: None },
        /// See [`FlashAttentionOptions::soft_cap`]; none by default.
        soft_cap: Option<f32> = None,
        /// The order of the axes; [`Layout::Bshd`] by default.
        layout: Layout = Layout::Bshd,
    }
}

/// Input of [`FlashAttention`].
#[derive(Debug, Clone, Copy)]
pub struct FlashAttentionInput<'a> {
    /// `[B, S_q, H, D]`.
    pub queries: &'a Array,
    /// `[B, S_kv, H_kv, D]`.
    pub keys: &'a Array,
    /// `[B, S_kv, H_kv, D_v]`.
    pub values: &'a Array,
    /// See [`FlashAttentionOptions::mask`].
    pub mask: Option<&'a Array>,
}

impl<'a> From<(&'a Array, &'a Array, &'a Array)> for FlashAttentionInput<'a> {
    fn from((queries, keys, values): (&'a Array, &'a Array, &'a Array)) -> Self {
        Self { queries, keys, values, mask: None }
    }
}

impl<'a> From<(&'a Array, &'a Array, &'a Array, &'a Array)> for FlashAttentionInput<'a> {
    fn from((queries, keys, values, mask): (&'a Array, &'a Array, &'a Array, &'a Array)) -> Self {
        Self { queries, keys, values, mask: Some(mask) }
    }
}

impl<'a> From<(&'a Array, &'a Array, &'a Array, Option<&'a Array>)> for FlashAttentionInput<'a> {
    fn from(
        (queries, keys, values, mask): (&'a Array, &'a Array, &'a Array, Option<&'a Array>),
    ) -> Self {
        Self { queries, keys, values, mask }
    }
}

/// [`flash_attention`] between heads of fixed number and size. It has no parameters.
///
/// # Shapes
/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttention, FlashAttentionBuilder};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut attention = FlashAttentionBuilder::new(8, 64).num_kv_heads(2).causal(true).build()?;
/// let queries = Array::ones::<f32>(&[1, 3, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 10, 2, 64])?;
/// let y = attention.forward((&queries, &keys, &keys))?;
/// assert_eq!(y.shape(), [1, 3, 8, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct FlashAttention {
    /// Query heads.
    pub num_heads: i32,
    /// The size of a query and of a key.
    pub head_dim: i32,
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// See [`FlashAttentionOptions::causal`].
    pub causal: bool,
    /// See [`FlashAttentionOptions::scale`].
    pub scale: Option<f32>,
    /// See [`FlashAttentionOptions::window`].
    pub window: Window,
    /// See [`FlashAttentionOptions::soft_cap`].
    pub soft_cap: Option<f32>,
    /// The order of the axes.
    pub layout: Layout,
}

impl FlashAttention {
    /// Attention that sees every key, between `num_heads` heads of `head_dim` elements on each side.
    ///
    /// # Errors
    /// When a number is below one.
    pub fn new(num_heads: i32, head_dim: i32) -> Result<Self> {
        Self::assemble(FlashAttentionBuilder::new(num_heads, head_dim))
    }

    fn assemble(builder: FlashAttentionBuilder) -> Result<Self> {
        let FlashAttentionBuilder {
            num_heads,
            head_dim,
            num_kv_heads,
            causal,
            scale,
            window,
            soft_cap,
            layout,
        } = builder;
        let num_kv_heads = num_kv_heads.unwrap_or(num_heads);
        CHECK.heads(num_heads, num_kv_heads, head_dim)?;
        if let Some(scale) = scale {
            CHECK.finite("scale", scale)?;
        }
        window.check(CHECK)?;
        if let Some(soft_cap) = soft_cap {
            CHECK.positive("soft_cap", soft_cap)?;
        }
        Ok(Self { num_heads, head_dim, num_kv_heads, causal, scale, window, soft_cap, layout })
    }

    fn check_heads(&self, input: FlashAttentionInput) -> Result<()> {
        let Self { num_heads, head_dim, num_kv_heads, layout, .. } = *self;
        CHECK.shape("queries", input.queries, &layout.axes("B", "S_q", num_heads, head_dim))?;
        CHECK.shape("keys", input.keys, &layout.axes("B", "S_kv", num_kv_heads, head_dim))
    }
}

impl<'a, Input> Module<Input> for FlashAttention
where
    Input: Into<FlashAttentionInput<'a>>,
{
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: Input) -> Result<Array, Exception> {
        let input = input.into();
        self.check_heads(input)?;
        let options = FlashAttentionOptions {
            scale: self.scale,
            causal: self.causal,
            mask: input.mask,
            window: self.window,
            soft_cap: self.soft_cap,
            layout: self.layout,
            ..Default::default()
        };
        Ok(flash_attention(input.queries, input.keys, input.values, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}
