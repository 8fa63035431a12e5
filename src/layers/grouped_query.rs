//! [`Attention`] by the names of its kinds.

use mlx_rs::{Array, error::Exception, module::Module};

use super::{Attention, AttentionBuilder, AttentionInput, parameters_of_inner};
use crate::{builder::builder, error::Result, norm::RmsNorm, rope::Rope};

builder! {
    /// Builder for [`GroupedQueryAttention`].
    GroupedQueryAttentionBuilder => GroupedQueryAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`.
        num_heads: i32,
        /// Key and value heads, `H_kv`, which must divide `H`.
        num_kv_heads: i32,
    ) {
        /// The size of a head, `D`; `dims / num_heads` by default.
        head_dim: Option<i32> = None,
        /// Rotates queries and keys; none by default.
        rope: Option<Rope> = None,
        /// Normalizes each head of queries and keys; none by default.
        qk_norm: Option<RmsNorm> = None,
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether a token sees only itself and those before it; `true` by default.
        causal: bool = true,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
        /// Whether the output projection has a bias; `false` by default.
        output_bias: bool = false,
    }
}

builder! {
    /// Builder for [`MultiQueryAttention`].
    MultiQueryAttentionBuilder => MultiQueryAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`.
        num_heads: i32,
    ) {
        /// The size of a head, `D`; `dims / num_heads` by default.
        head_dim: Option<i32> = None,
        /// Rotates queries and keys; none by default.
        rope: Option<Rope> = None,
        /// Normalizes each head of queries and keys; none by default.
        qk_norm: Option<RmsNorm> = None,
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether a token sees only itself and those before it; `true` by default.
        causal: bool = true,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
        /// Whether the output projection has a bias; `false` by default.
        output_bias: bool = false,
    }
}

/// [`Attention`] in which groups of `H / H_kv` query heads share the keys and values of one head.
///
/// A cache is then as many times smaller. The parameters have the names that [`Attention`] gives them.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::GroupedQueryAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = GroupedQueryAttention::new(64, 8, 2)?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 10, 64])?)?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Ainslie et al., [GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
/// Checkpoints](https://arxiv.org/abs/2305.13245), 2023.
#[derive(Debug, Clone)]
pub struct GroupedQueryAttention {
    /// What it is made of.
    pub attention: Attention,
}

/// [`Attention`] in which all query heads share one head of keys and values.
///
/// A cache is then `H` times smaller. The parameters have the names that [`Attention`] gives them.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::{cache::SimpleKvCache, layers::MultiQueryAttention};
/// use mlx_rs::{Array, module::Module};
///
/// let (mut attention, mut cache) = (MultiQueryAttention::new(64, 8)?, SimpleKvCache::new());
/// let prompt = Array::ones::<f32>(&[1, 10, 64])?;
/// assert_eq!(attention.forward((&prompt, &mut cache))?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Shazeer, [Fast Transformer Decoding: One Write-Head is All You
/// Need](https://arxiv.org/abs/1911.02150), 2019.
#[derive(Debug, Clone)]
pub struct MultiQueryAttention {
    /// What it is made of.
    pub attention: Attention,
}

impl GroupedQueryAttention {
    /// Causal attention without rotation or biases.
    ///
    /// # Errors
    /// When a size is below one, `num_heads` does not divide `dims` or is no multiple of `num_kv_heads`, or the sizes
    /// are too large; under the name of [`Attention`].
    pub fn new(dims: i32, num_heads: i32, num_kv_heads: i32) -> Result<Self> {
        Self::assemble(GroupedQueryAttentionBuilder::new(dims, num_heads, num_kv_heads))
    }
}

impl MultiQueryAttention {
    /// Causal attention without rotation or biases.
    ///
    /// # Errors
    /// When a size is below one, `num_heads` does not divide `dims`, or the sizes are too large; under the name of
    /// [`Attention`].
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(MultiQueryAttentionBuilder::new(dims, num_heads))
    }
}

/// Writes what a module is that is nothing but an [`Attention`] with this many key heads.
macro_rules! kind_of_attention {
    ($module:ident, $builder:ident, |$of:ident| $num_kv_heads:expr) => {
        impl $module {
            fn assemble($of: $builder) -> Result<Self> {
                use mlx_rs::builder::Builder;
                let attention = AttentionBuilder {
                    dims: $of.dims,
                    num_heads: $of.num_heads,
                    num_kv_heads: Some($num_kv_heads),
                    head_dim: $of.head_dim,
                    rope: $of.rope,
                    qk_norm: $of.qk_norm,
                    scale: $of.scale,
                    causal: $of.causal,
                    bias: $of.bias,
                    output_bias: $of.output_bias,
                };
                Ok(Self { attention: attention.build()? })
            }

            /// See [`Attention::prepare_for_inference`].
            ///
            /// # Errors
            /// When MLX fails.
            pub fn prepare_for_inference(&mut self) -> Result<()> {
                self.attention.prepare_for_inference()
            }

            fn inner(&self) -> &Attention {
                &self.attention
            }

            fn inner_mut(&mut self) -> &mut Attention {
                &mut self.attention
            }
        }

        parameters_of_inner!($module);

        impl<'a, I: Into<AttentionInput<'a>>> Module<I> for $module {
            type Output = Array;
            type Error = Exception;

            fn forward(&mut self, input: I) -> Result<Array, Exception> {
                self.attention.forward(input)
            }

            fn training_mode(&mut self, mode: bool) {
                Module::<&Array>::training_mode(&mut self.attention, mode);
            }
        }
    };
}

kind_of_attention!(GroupedQueryAttention, GroupedQueryAttentionBuilder, |of| of.num_kv_heads);
kind_of_attention!(MultiQueryAttention, MultiQueryAttentionBuilder, |of| 1);
