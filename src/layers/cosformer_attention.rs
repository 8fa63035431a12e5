//! cosFormer attention with its projections.

use mlx_rs::{Array, error::Exception, module::Module};

use super::{
    LinearAttentionInput,
    head_projections::{HeadProjections, HeadSizes},
    parameters_of_field,
};
use crate::{
    attention::{
        CosFormerAttentionOptions, LinearAttentionOptions, cosformer_attention_with_state,
    },
    builder::builder,
    check::Check,
    error::Result,
};

const CHECK: Check = Check::op("CosFormerAttention");

builder! {
    /// Builder for [`CosFormerAttention`].
    CosFormerAttentionBuilder => CosFormerAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// See [`CosFormerAttentionOptions::max_length`]; the length of each input by default. A cache needs one.
        max_length: Option<i32> = None,
        /// Whether a token sees only itself and those before it; `false` by default.
        causal: bool = false,
        /// See [`CosFormerAttentionOptions::eps`]; 1e-6 by default.
        eps: f32 = LinearAttentionOptions::DEFAULT_EPS,
        /// See [`LinearAttentionOptions::chunk_size`]; 128 by default.
        chunk_size: i32 = LinearAttentionOptions::DEFAULT_CHUNK_SIZE,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`cosformer_attention`](crate::attention::cosformer_attention) from a sequence to itself, with its projections.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::CosFormerAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = CosFormerAttention::new(64, 4)?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 10, 64])?)?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct CosFormerAttention {
    /// Their parameters are those of the layer.
    pub projections: HeadProjections,
    max_length: Option<i32>,
    causal: bool,
    eps: f32,
    chunk_size: i32,
}

parameters_of_field!(CosFormerAttention, projections);

impl CosFormerAttention {
    /// Attention to every token, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(CosFormerAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: CosFormerAttentionBuilder) -> Result<Self> {
        let CosFormerAttentionBuilder { dims, num_heads, num_kv_heads, bias, .. } = builder;
        let CosFormerAttentionBuilder { max_length, causal, eps, chunk_size, .. } = builder;
        let sizes = HeadSizes::new(CHECK, dims, num_heads, num_kv_heads)?;
        CHECK.at_least("max_length", max_length.unwrap_or(1), 1)?;
        CHECK.non_negative("eps", eps)?;
        CHECK.at_least("chunk_size", chunk_size, 1)?;
        let projections = HeadProjections::new(sizes, bias)?;
        Ok(Self { projections, max_length, causal, eps, chunk_size })
    }
}

impl<'a, I: Into<LinearAttentionInput<'a>>> Module<I> for CosFormerAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let input = input.into();
        let named = input.cache.is_none() || self.max_length.is_some();
        CHECK.value(named, "max_length", "be given with a cache", "none")?;
        let [queries, keys, values] = self.projections.split(CHECK, input.x)?;
        let options = CosFormerAttentionOptions {
            causal: self.causal,
            max_length: self.max_length,
            offset: input.offset(),
            eps: self.eps,
            chunk_size: self.chunk_size,
            state: input.state(),
            ..Default::default()
        };
        let (attended, state) = cosformer_attention_with_state(queries, keys, values, options)?;
        let y = self.projections.merge(&attended)?;
        input.keep(state);
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projections.set_training_mode(mode);
    }
}
