//! The layer: a number to learn for each head and bucket.

use mlx_rs::{
    Array,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::{indexing::TryIndexOp, zeros_dtype},
    random::normal,
};

use super::{RelativePositionBucketOptions, Span, relative_position::buckets_of};
use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
};

const CHECK: Check = Check::op("RelativePositionBias");

builder! {
    /// Builder for [`RelativePositionBias`].
    RelativePositionBiasBuilder => RelativePositionBias (
        /// Query heads, `H`.
        num_heads: i32,
    ) {
        /// See [`RelativePositionBucketOptions::bidirectional`]; `true` by default.
        bidirectional: bool = true,
        /// See [`RelativePositionBucketOptions::num_buckets`]; 32 by default.
        num_buckets: i32 = RelativePositionBucketOptions::DEFAULT_NUM_BUCKETS,
        /// See [`RelativePositionBucketOptions::max_distance`]; 128 by default.
        max_distance: i32 = RelativePositionBucketOptions::DEFAULT_MAX_DISTANCE,
    }
}

/// T5's bias: what is added to a score depends on the head and on how far the key is from the query, by
/// [`relative_position_bucket`](super::relative_position_bucket).
///
/// `bias[h, i, j] = weight[bucket(j − offset − i), h]`.
///
/// # Shapes
/// Two lengths to `[H, S_q, S_kv]`, of the dtype of the weight: a mask of
/// [`flash_attention`](crate::attention::flash_attention). T5 has no other scale, so set that of attention to 1 for its
/// weights.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, RelativePositionBias, flash_attention};
/// use mlx_rs::{Array, module::Module};
///
/// let mut position = RelativePositionBias::new(8)?;
/// let bias = position.forward((10, 10))?;
/// let x = Array::ones::<f32>(&[1, 10, 8, 64])?;
/// let options = FlashAttentionOptions { mask: Some(&bias), scale: Some(1.0), ..Default::default() };
/// assert_eq!(flash_attention(&x, &x, &x, options)?.shape(), [1, 10, 8, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Raffel et al., [Exploring the Limits of Transfer Learning with a Unified Text-to-Text
/// Transformer](https://arxiv.org/abs/1910.10683), 2019.
#[derive(Debug, Clone, ModuleParameters)]
pub struct RelativePositionBias {
    /// `[num_buckets, H]`, at first normal with deviation `1 / sqrt(H)`.
    #[param]
    pub weight: Param<Array>,
    options: RelativePositionBucketOptions,
    num_heads: i32,
}

/// Input of [`RelativePositionBias`].
#[derive(Debug, Clone, Copy)]
pub struct RelativePositionBiasInput {
    /// `S_q`.
    pub query_length: i32,
    /// `S_kv`.
    pub key_length: i32,
    /// The position of the first query, where that of the first key is 0; `S_kv − S_q` if there is none.
    pub offset: Option<i32>,
}

impl From<(i32, i32)> for RelativePositionBiasInput {
    /// As many queries, the last of them at the last of as many keys.
    fn from((query_length, key_length): (i32, i32)) -> Self {
        Self { query_length, key_length, offset: None }
    }
}

impl RelativePositionBias {
    /// 32 buckets in both directions, the last from a distance of 128 on.
    ///
    /// # Errors
    /// When `num_heads` is below one.
    pub fn new(num_heads: i32) -> Result<Self> {
        Self::assemble(RelativePositionBiasBuilder::new(num_heads))
    }

    fn assemble(builder: RelativePositionBiasBuilder) -> Result<Self> {
        let RelativePositionBiasBuilder { num_heads, bidirectional, num_buckets, max_distance } =
            builder;
        let options = RelativePositionBucketOptions { bidirectional, num_buckets, max_distance };
        CHECK.at_least("num_heads", num_heads, 1)?;
        options.check(CHECK)?;
        let deviation = (num_heads as f32).sqrt().recip();
        let weight = normal::<f32>(&[num_buckets, num_heads], None, deviation, None)?;
        Ok(Self { weight: Param::new(weight), options, num_heads })
    }

    /// Which buckets there are.
    pub fn options(&self) -> RelativePositionBucketOptions {
        self.options
    }

    /// The bias of each distance there is, `[H, S_q + S_kv − 1]`, from the last query and the first key on.
    fn by_distance(&self, span: Span) -> Result<Array> {
        let line = Span { queries: 1, keys: span.queries + span.keys - 1, ..span };
        let line = Span { offset: span.offset + span.queries - 1, ..line };
        let buckets = buckets_of(&line.relative_positions()?, &self.options)?;
        Ok(self.weight.take_axis(buckets.try_index(0)?, 0)?.swap_axes(0, 1)?)
    }
}

impl<I: Into<RelativePositionBiasInput>> Module<I> for RelativePositionBias {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let RelativePositionBiasInput { query_length, key_length, offset } = input.into();
        let dtype = CHECK.floating("weight", &self.weight)?;
        CHECK.shape("weight", &self.weight, axes![self.options.num_buckets, self.num_heads])?;
        let span = Span::new(CHECK, query_length, key_length, offset)?;
        let shape = [self.num_heads, query_length, key_length];
        if shape.contains(&0) {
            return zeros_dtype(&shape, dtype);
        }
        let places = Span { offset: 1 - query_length, ..span }.relative_positions()?;
        self.by_distance(span)?.take_axis(places, 1)
    }

    fn training_mode(&mut self, _: bool) {}
}
