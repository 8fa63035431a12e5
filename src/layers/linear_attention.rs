//! Linear attention with its projections.

use mlx_rs::{Array, error::Exception, module::Module};

use super::{
    head_projections::{HeadProjections, HeadSizes},
    parameters_of_field,
};
use crate::{
    attention::{
        FeatureMap, LinearAttentionOptions, LinearAttentionState, linear_attention_with_state,
    },
    builder::builder,
    check::Check,
    error::Result,
};

const CHECK: Check = Check::op("LinearAttention");

builder! {
    /// Builder for [`LinearAttention`].
    LinearAttentionBuilder => LinearAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// See [`LinearAttentionOptions::feature_map`]; `elu + 1` by default.
        feature_map: FeatureMap = FeatureMap::default(),
        /// Whether a token sees only itself and those before it; `false` by default.
        causal: bool = false,
        /// See [`LinearAttentionOptions::eps`]; 1e-6 by default.
        eps: f32 = LinearAttentionOptions::DEFAULT_EPS,
        /// See [`LinearAttentionOptions::chunk_size`]; 128 by default.
        chunk_size: i32 = LinearAttentionOptions::DEFAULT_CHUNK_SIZE,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`linear_attention`](crate::attention::linear_attention) from a sequence to itself, with its projections.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::{LinearAttentionBuilder, LinearAttentionCache};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut attention = LinearAttentionBuilder::new(64, 4).causal(true).build()?;
/// let mut cache = LinearAttentionCache::default();
/// attention.forward((&Array::ones::<f32>(&[1, 10, 64])?, &mut cache))?;
/// let y = attention.forward((&Array::ones::<f32>(&[1, 1, 64])?, &mut cache))?;
/// assert_eq!((y.shape(), cache.len()), (&[1, 1, 64][..], 11));
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct LinearAttention {
    /// Their parameters are those of the layer.
    pub projections: HeadProjections,
    feature_map: FeatureMap,
    causal: bool,
    eps: f32,
    chunk_size: i32,
}

parameters_of_field!(LinearAttention, projections);

/// Input of [`LinearAttention`], [`PerformerAttention`](super::PerformerAttention) and
/// [`CosFormerAttention`](super::CosFormerAttention): `x`, and what is known of earlier tokens.
#[derive(Debug)]
pub struct LinearAttentionInput<'a> {
    /// `[B, S, dims]`.
    pub x: &'a Array,
    /// Of one layer and one sequence; this call adds its tokens, unless it fails.
    pub cache: Option<&'a mut LinearAttentionCache>,
}

impl<'a> From<&'a Array> for LinearAttentionInput<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, cache: None }
    }
}

impl<'a> From<(&'a Array, &'a mut LinearAttentionCache)> for LinearAttentionInput<'a> {
    fn from((x, cache): (&'a Array, &'a mut LinearAttentionCache)) -> Self {
        Self { x, cache: Some(cache) }
    }
}

/// What a layer of linear attention knows of the tokens so far, however many.
#[derive(Debug, Clone, Default)]
pub struct LinearAttentionCache {
    state: Option<LinearAttentionState>,
    tokens: i32,
}

impl LinearAttentionCache {
    /// How many tokens it has seen.
    pub fn len(&self) -> i32 {
        self.tokens
    }

    /// Whether it has seen none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Its sums, once it has seen something.
    pub fn state(&self) -> Option<&LinearAttentionState> {
        self.state.as_ref()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

impl LinearAttentionInput<'_> {
    pub(super) fn state(&self) -> Option<&LinearAttentionState> {
        self.cache.as_ref().and_then(|cache| cache.state())
    }

    pub(super) fn offset(&self) -> i32 {
        self.cache.as_ref().map_or(0, |cache| cache.len())
    }

    /// Makes the state that of the cache, if there is one.
    pub(super) fn keep(self, state: LinearAttentionState) {
        if let Some(cache) = self.cache {
            cache.tokens = cache.tokens.saturating_add(self.x.dim(1));
            cache.state = Some(state);
        }
    }
}

impl LinearAttention {
    /// Attention to every token with `elu + 1` features, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(LinearAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: LinearAttentionBuilder) -> Result<Self> {
        let LinearAttentionBuilder { dims, num_heads, num_kv_heads, bias, .. } = builder;
        let LinearAttentionBuilder { feature_map, causal, eps, chunk_size, .. } = builder;
        let sizes = HeadSizes::new(CHECK, dims, num_heads, num_kv_heads)?;
        CHECK.non_negative("eps", eps)?;
        CHECK.at_least("chunk_size", chunk_size, 1)?;
        let projections = HeadProjections::new(sizes, bias)?;
        Ok(Self { projections, feature_map, causal, eps, chunk_size })
    }
}

impl<'a, I: Into<LinearAttentionInput<'a>>> Module<I> for LinearAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let input = input.into();
        let [queries, keys, values] = self.projections.split(CHECK, input.x)?;
        let options = LinearAttentionOptions {
            feature_map: self.feature_map,
            causal: self.causal,
            eps: self.eps,
            chunk_size: self.chunk_size,
            state: input.state(),
            ..Default::default()
        };
        let (attended, state) = linear_attention_with_state(queries, keys, values, options)?;
        let y = self.projections.merge(&attended)?;
        input.keep(state);
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projections.set_training_mode(mode);
    }
}
