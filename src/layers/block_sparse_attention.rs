//! Attention to some blocks, with its projections.

use mlx_rs::{Array, error::Exception, module::Module};

use super::{
    head_projections::{HeadProjections, HeadSizes},
    parameters_of_field,
};
use crate::{
    attention::{
        BigBirdAttentionOptions, BlockPattern, BlockSparseAttentionOptions, bigbird_attention,
        block_sparse_attention,
    },
    builder::builder,
    check::Check,
    error::Result,
};

const CHECK: Check = Check::op("BlockSparseAttention");
const BIG_BIRD: Check = Check::op("BigBirdAttention");

builder! {
    /// Builder for [`BlockSparseAttention`].
    BlockSparseAttentionBuilder => BlockSparseAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// How many tokens are in a block; 64 by default.
        block_size: i32 = 64,
        /// Which blocks see which, and whether a token sees none after it; one block to each side and the first block by
        /// default.
        pattern: BlockPattern = BlockPattern::default(),
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`block_sparse_attention`] from a sequence to itself, with its projections.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::{attention::BlockPattern, layers::BlockSparseAttentionBuilder};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let pattern = BlockPattern { causal: true, ..Default::default() };
/// let mut attention =
///     BlockSparseAttentionBuilder::new(64, 4).block_size(16).pattern(pattern).build()?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 100, 64])?)?.shape(), [1, 100, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct BlockSparseAttention {
    /// Their parameters are those of the layer.
    pub projections: HeadProjections,
    block_size: i32,
    pattern: BlockPattern,
    scale: Option<f32>,
}

parameters_of_field!(BlockSparseAttention, projections);

impl BlockSparseAttention {
    /// Attention to blocks of 64: a token's own, one to each side and the first, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(BlockSparseAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: BlockSparseAttentionBuilder) -> Result<Self> {
        let BlockSparseAttentionBuilder { dims, num_heads, num_kv_heads, bias, .. } = builder;
        let BlockSparseAttentionBuilder { block_size, pattern, scale, .. } = builder;
        let sizes = HeadSizes::new(CHECK, dims, num_heads, num_kv_heads)?;
        pattern.check(CHECK, block_size)?;
        CHECK.finite("scale", scale.unwrap_or(1.0))?;
        Ok(Self { projections: HeadProjections::new(sizes, bias)?, block_size, pattern, scale })
    }
}

impl Module<&Array> for BlockSparseAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let [queries, keys, values] = self.projections.split(CHECK, x)?;
        let blocks = self.pattern.layout(self.block_size, x.dim(1), x.dim(1))?;
        let options = BlockSparseAttentionOptions {
            scale: self.scale,
            causal: self.pattern.causal,
            ..BlockSparseAttentionOptions::new(&blocks)
        };
        let attended = block_sparse_attention(queries, keys, values, options)?;
        self.projections.merge(&attended)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projections.set_training_mode(mode);
    }
}

builder! {
    /// Builder for [`BigBirdAttention`].
    BigBirdAttentionBuilder => BigBirdAttention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`, which must divide `dims`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// Blocks, scale and causality; the paper's by default. The layout is that of the layer.
        options: BigBirdAttentionOptions = BigBirdAttentionOptions::default(),
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// [`bigbird_attention`] from a sequence to itself, with its projections.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::layers::BigBirdAttention;
/// use mlx_rs::{Array, module::Module};
///
/// let mut attention = BigBirdAttention::new(64, 4)?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 100, 64])?)?.shape(), [1, 100, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct BigBirdAttention {
    /// Their parameters are those of the layer.
    pub projections: HeadProjections,
    options: BigBirdAttentionOptions,
}

parameters_of_field!(BigBirdAttention, projections);

impl BigBirdAttention {
    /// Attention to blocks of 64: three neighbours, the first two and three at random, without biases.
    ///
    /// # Errors
    /// When a size is below one, or `num_heads` does not divide `dims`.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(BigBirdAttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: BigBirdAttentionBuilder) -> Result<Self> {
        let BigBirdAttentionBuilder { dims, num_heads, num_kv_heads, options, bias } = builder;
        let sizes = HeadSizes::new(BIG_BIRD, dims, num_heads, num_kv_heads)?;
        options.check(BIG_BIRD)?;
        let options = BigBirdAttentionOptions { layout: crate::Layout::Bshd, ..options };
        Ok(Self { projections: HeadProjections::new(sizes, bias)?, options })
    }
}

impl Module<&Array> for BigBirdAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let [queries, keys, values] = self.projections.split(BIG_BIRD, x)?;
        let attended = bigbird_attention(queries, keys, values, self.options)?;
        self.projections.merge(&attended)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projections.set_training_mode(mode);
    }
}
