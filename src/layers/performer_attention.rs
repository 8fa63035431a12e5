//! Performer attention with its projections.

use mlx_rs::{Array, error::Exception, module::Module, random};

use super::{
    LinearAttentionInput,
    head_projections::{HeadProjections, HeadSizes},
    parameters_of_field,
};
use crate::{
    attention::{
        LinearAttentionOptions, PerformerAttentionOptions, orthogonal_features,
        performer_attention_with_state,
    },
    builder::builder,
    check::Check,
    error::Result,
};

const CHECK: Check = Check::op("PerformerAttention");

builder! {
    /// Builder for [`PerformerAttention`].
    PerformerAttentionBuilder => PerformerAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// How many features estimate the weights, up to 2^20; `D ln D` by default, rounded up.
        num_features: Option<i32> = None,
        /// What the features are drawn from: layers built alike have them alike; 0 by default.
        seed: u64 = 0_u64,
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether a token sees only itself and those before it; `false` by default.
        causal: bool = false,
        /// See [`LinearAttentionOptions::chunk_size`]; 128 by default.
        chunk_size: i32 = LinearAttentionOptions::DEFAULT_CHUNK_SIZE,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`performer_attention`](crate::attention::performer_attention) from a sequence to itself, with its projections.
///
/// The features are no parameters: they are neither trained nor saved, and come from the seed.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::PerformerAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = PerformerAttention::new(64, 4)?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 10, 64])?)?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct PerformerAttention {
    /// Their parameters are those of the layer.
    pub projections: HeadProjections,
    features: Array,
    scale: Option<f32>,
    causal: bool,
    chunk_size: i32,
}

parameters_of_field!(PerformerAttention, projections);

impl PerformerAttention {
    /// Attention to every token with `D ln D` features, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(PerformerAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: PerformerAttentionBuilder) -> Result<Self> {
        let PerformerAttentionBuilder { dims, num_heads, num_kv_heads, bias, .. } = builder;
        let PerformerAttentionBuilder { scale, causal, chunk_size, .. } = builder;
        let sizes = HeadSizes::new(CHECK, dims, num_heads, num_kv_heads)?;
        CHECK.positive("scale", scale.unwrap_or(1.0))?;
        CHECK.at_least("chunk_size", chunk_size, 1)?;
        let size = f64::from(sizes.head_dim);
        let num_features =
            builder.num_features.unwrap_or((size * size.ln()).ceil().max(1.0) as i32);
        let features =
            orthogonal_features(random::key(builder.seed)?, num_features, sizes.head_dim)?;
        let projections = HeadProjections::new(sizes, bias)?;
        Ok(Self { projections, features, scale, causal, chunk_size })
    }

    /// The directions that queries and keys are projected on, `[M, D]`. They are no parameter: before the layer goes to another
    /// thread, evaluate them as well.
    pub fn features(&self) -> &Array {
        &self.features
    }

    /// Draws as many features anew, which some do now and then in training. What a cache holds is of the old ones.
    ///
    /// # Errors
    /// When `key` is no key.
    pub fn redraw(&mut self, key: impl AsRef<Array>) -> Result<()> {
        self.features = orthogonal_features(key, self.features.dim(0), self.features.dim(1))?;
        Ok(())
    }
}

impl<'a, I: Into<LinearAttentionInput<'a>>> Module<I> for PerformerAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let input = input.into();
        let [queries, keys, values] = self.projections.split(CHECK, input.x)?;
        let options = PerformerAttentionOptions {
            scale: self.scale,
            causal: self.causal,
            chunk_size: self.chunk_size,
            state: input.state(),
            ..PerformerAttentionOptions::new(&self.features)
        };
        let (attended, state) = performer_attention_with_state(queries, keys, values, options)?;
        let y = self.projections.merge(&attended)?;
        input.keep(state);
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projections.set_training_mode(mode);
    }
}
