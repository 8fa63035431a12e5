//! Longformer attention with its projections.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{Projection, head_projections::HeadSizes};
use crate::{
    attention::{LongformerAttentionOptions, LongformerGlobal, longformer_attention},
    builder::builder,
    check::Check,
    error::Result,
};

const CHECK: Check = Check::op("LongformerAttention");

builder! {
    /// Builder for [`LongformerAttention`].
    LongformerAttentionBuilder => LongformerAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// How many tokens to each side a token sees; 256 by default.
        window: i32 = LongformerAttentionOptions::DEFAULT_WINDOW,
        /// How many of the first tokens see all and are seen by all, where the input names none; 1 by default.
        num_global_tokens: i32 = 1,
        /// Whether global tokens have projections of their own, as in the paper; `true` by default.
        global_projections: bool = true,
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether the projections to queries, keys and values have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`longformer_attention`] from a sequence to itself, with its projections.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::LongformerAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = LongformerAttention::new(64, 4)?;
/// let x = Array::ones::<f32>(&[1, 100, 64])?;
/// assert_eq!(attention.forward(&x)?.shape(), [1, 100, 64]);
/// assert_eq!(attention.forward((&x, &[0, 40][..]))?.shape(), [1, 100, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct LongformerAttention {
    /// `[H · D, dims]`.
    #[param]
    pub query: Projection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub key: Projection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub value: Projection,
    /// `[dims, H · D]`.
    #[param]
    pub output: Projection,
    /// `[H · D, dims]`: of the global tokens, if they have their own.
    #[param]
    pub query_global: Option<Projection>,
    /// `[H_kv · D, dims]`: of what global tokens see.
    #[param]
    pub key_global: Option<Projection>,
    /// `[H_kv · D, dims]`: of what global tokens see.
    #[param]
    pub value_global: Option<Projection>,
    sizes: HeadSizes,
    window: i32,
    num_global_tokens: i32,
    scale: Option<f32>,
}

/// Input of [`LongformerAttention`].
#[derive(Debug, Clone, Copy)]
pub struct LongformerAttentionInput<'a> {
    /// `[B, S, dims]`.
    pub x: &'a Array,
    /// The positions of the tokens that see all and are seen by all; the first ones, as many as the layer was built
    /// with, if there are none here.
    pub global_tokens: Option<&'a [i32]>,
}

impl<'a> From<&'a Array> for LongformerAttentionInput<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, global_tokens: None }
    }
}

impl<'a> From<(&'a Array, &'a [i32])> for LongformerAttentionInput<'a> {
    fn from((x, global_tokens): (&'a Array, &'a [i32])) -> Self {
        Self { x, global_tokens: Some(global_tokens) }
    }
}

impl LongformerAttention {
    /// Attention to 256 tokens to each side and to the first, which has projections of its own, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(LongformerAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: LongformerAttentionBuilder) -> Result<Self> {
        let LongformerAttentionBuilder { dims, num_heads, num_kv_heads, bias, .. } = builder;
        let LongformerAttentionBuilder { window, num_global_tokens, scale, .. } = builder;
        let sizes = HeadSizes::new(CHECK, dims, num_heads, num_kv_heads)?;
        CHECK.at_least("window", window, 0)?;
        CHECK.at_least("num_global_tokens", num_global_tokens, 0)?;
        CHECK.finite("scale", scale.unwrap_or(1.0))?;
        let own = builder.global_projections;
        Ok(Self {
            query: sizes.to_queries(bias)?,
            key: sizes.to_keys(bias)?,
            value: sizes.to_keys(bias)?,
            output: sizes.to_queries(false)?,
            query_global: own.then(|| sizes.to_queries(bias)).transpose()?,
            key_global: own.then(|| sizes.to_keys(bias)).transpose()?,
            value_global: own.then(|| sizes.to_keys(bias)).transpose()?,
            sizes,
            window,
            num_global_tokens,
            scale,
        })
    }

    /// What global tokens compare and average with, if they have their own.
    fn project_global(&mut self, x: &Array, tokens: &[i32]) -> Result<Option<[Array; 3]>> {
        let sizes = self.sizes;
        let (Some(query), Some(key), Some(value)) =
            (&mut self.query_global, &mut self.key_global, &mut self.value_global)
        else {
            return Ok(None);
        };
        for &token in tokens {
            let expected = format_args!("be from 0 to below {}", x.dim(1));
            CHECK.value((0..x.dim(1)).contains(&token), "global_tokens", expected, token)?;
        }
        if tokens.is_empty() {
            return Ok(None);
        }
        let places = Array::from_slice(tokens, &[tokens.len() as i32]);
        let queries = query.forward(&x.take_axis(places, 1)?)?;
        let projected = [queries, key.forward(x)?, value.forward(x)?];
        let [queries, keys, values] = projected.map(|array| sizes.split(array));
        Ok(Some([queries?, keys?, values?]))
    }
}

impl<'a, I: Into<LongformerAttentionInput<'a>>> Module<I> for LongformerAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let LongformerAttentionInput { x, global_tokens } = input.into();
        let sizes = self.sizes;
        sizes.check(CHECK, x)?;
        let first: Vec<_> = (0..self.num_global_tokens.min(x.dim(1))).collect();
        let global_tokens = global_tokens.unwrap_or(&first);
        let global = self.project_global(x, global_tokens)?;
        let global = global.as_ref().map(|[queries, keys, values]| LongformerGlobal {
            queries,
            keys,
            values,
        });
        let options = LongformerAttentionOptions {
            window: self.window,
            global_tokens,
            global,
            scale: self.scale,
            ..Default::default()
        };
        let queries = sizes.split(self.query.forward(x)?)?;
        let keys = sizes.split(self.key.forward(x)?)?;
        let values = sizes.split(self.value.forward(x)?)?;
        let attended = longformer_attention(queries, keys, values, options)?;
        self.output.forward(&attended.reshape(&[x.dim(0), x.dim(1), sizes.dims])?)
    }

    fn training_mode(&mut self, mode: bool) {
        let own = [&mut self.query_global, &mut self.key_global, &mut self.value_global];
        for projection in [&mut self.query, &mut self.key, &mut self.value, &mut self.output] {
            projection.training_mode(mode);
        }
        own.into_iter().flatten().for_each(|projection| projection.training_mode(mode));
    }
}
