//! Neighbours, the first blocks, and some at random.

use mlx_rs::Array;

use super::{
    block_sparse::{BlockSparseAttentionOptions, attend, is_empty, nothing},
    layout::{BlockPattern, Blocks},
};
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout};

/// Options of [`bigbird_attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BigBirdAttentionOptions {
    /// How many tokens are in a block, from 1. Default: 64.
    pub block_size: i32,
    /// How many blocks to each side of its own a block sees, from 0. Default: 1, the three blocks of the paper.
    pub window_blocks: i32,
    /// How many of the first blocks see all and are seen by all, from 0. Default: 2.
    pub global_blocks: i32,
    /// How many further blocks each block sees, from 0. Default: 3.
    pub random_blocks: i32,
    /// What the random blocks depend on, and nothing else. Default: 0.
    pub seed: u64,
    /// What the products of queries and keys are multiplied by: any finite number. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`; random blocks are then drawn from those before it.
    /// Default: no.
    pub causal: bool,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl Default for BigBirdAttentionOptions {
    fn default() -> Self {
        Self {
            block_size: 64,
            window_blocks: 1,
            global_blocks: 2,
            random_blocks: 3,
            seed: 0,
            scale: None,
            causal: false,
            layout: Layout::default(),
        }
    }
}

impl BigBirdAttentionOptions {
    /// Its blocks, for any length.
    pub fn pattern(&self) -> BlockPattern {
        BlockPattern {
            before: self.window_blocks,
            after: self.window_blocks,
            global_blocks: self.global_blocks,
            random_blocks: self.random_blocks,
            seed: self.seed,
            causal: self.causal,
        }
    }

    pub(crate) fn check(&self, check: Check) -> Result<()> {
        check.at_least("window_blocks", self.window_blocks, 0)?;
        self.pattern().check(check, self.block_size)?;
        check.finite("scale", self.scale.unwrap_or(1.0))
    }
}

/// Attention to neighbouring blocks, to the first blocks and to a few random ones.
///
/// [`block_sparse_attention`](super::block_sparse_attention) by the layout of [`BigBirdAttentionOptions::pattern`], the
/// same for all heads: global tokens are those of the first blocks of the sequence. A query that sees no key yields zero.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when `H` is not a multiple
/// of `H_kv`, when the dtypes differ or are not floating point, when the scale is not finite, when `block_size` is below
/// one, or when a number of blocks is negative.
///
/// # Example
/// ```
/// use mlx_primitives::attention::bigbird_attention;
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// assert!(bigbird_attention(&x, &x, &x, Default::default())?.all_close(&x, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Those of [`block_sparse_attention`](super::block_sparse_attention).
///
/// Zaheer et al., [Big Bird: Transformers for Longer Sequences](https://arxiv.org/abs/2007.14062), 2020.
pub fn bigbird_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: BigBirdAttentionOptions,
) -> Result<Array> {
    let BigBirdAttentionOptions { block_size, scale, causal, layout, .. } = options;
    let check = Check::op("bigbird_attention");
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let heads = Heads::new(check, arrays, layout)?;
    options.check(check)?;
    if is_empty(&heads) {
        return nothing(&heads, layout);
    }
    let Heads { query_length, key_length, .. } = heads;
    let blocks = options.pattern().rows(Blocks { block_size, query_length, key_length });
    attend(arrays, heads, BlockSparseAttentionOptions { blocks: &blocks, scale, causal, layout })
}
