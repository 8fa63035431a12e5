//! Attention by a layout of blocks.

use mlx_rs::{Array, ops::zeros_dtype};

use super::{
    gather::{Gather, Hides},
    layout::{BlockLayout, Blocks},
};
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout};

/// Options of [`block_sparse_attention`]: [`BlockSparseAttentionOptions::new`] and what differs from it.
#[derive(Debug, Clone, Copy)]
pub struct BlockSparseAttentionOptions<'a> {
    /// Which blocks of keys each block of queries sees.
    pub blocks: &'a BlockLayout,
    /// What the products of queries and keys are multiplied by: any finite number. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q` of its blocks. Default: no.
    pub causal: bool,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl<'a> BlockSparseAttentionOptions<'a> {
    /// The defaults, with these blocks.
    pub fn new(blocks: &'a BlockLayout) -> Self {
        Self { blocks, scale: None, causal: false, layout: Layout::default() }
    }
}

/// Averages `values` for each query, weighted by how well the keys match it, over the blocks of keys that its block
/// sees.
///
/// `y_i = Σ_j softmax_j(scale · q_i · k_j) v_j` over the keys `j` of those blocks. With blocks of `b`, query `i` is in
/// block `i / b` and key `j` in block `j / b`; the last blocks may be short. A query that sees no key yields zero.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`: query head `h` reads head
///   `h / (H / H_kv)`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when `H` is not a multiple
/// of `H_kv`, when the dtypes differ or are not floating point, when the scale is not finite, or when the layout is of
/// another number of blocks than the queries or the keys.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{
///     BlockPattern, BlockSparseAttentionOptions, block_sparse_attention,
/// };
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let blocks = BlockPattern::default().layout(64, 1000, 1000)?;
/// let y = block_sparse_attention(&x, &x, &x, BlockSparseAttentionOptions::new(&blocks))?;
/// assert!(y.all_close(&x, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Each block of queries goes to [`flash_attention`](crate::attention::flash_attention) with its keys and values, which
/// are gathered: time and memory grow as `S_q` times the keys seen. Rows of about as many blocks are computed together,
/// so that rows which see everything cost no more than themselves.
///
/// Child et al., [Generating Long Sequences with Sparse Transformers](https://arxiv.org/abs/1904.10509), 2019.
pub fn block_sparse_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: BlockSparseAttentionOptions<'_>,
) -> Result<Array> {
    let check = Check::op("block_sparse_attention");
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let heads = Heads::new(check, arrays, options.layout)?;
    check.finite("scale", options.scale.unwrap_or(1.0))?;
    let blocks = Blocks {
        block_size: options.blocks.block_size(),
        query_length: heads.query_length,
        key_length: heads.key_length,
    };
    let (rows, expected) = (options.blocks.rows().len(), blocks.query_blocks());
    let rows_fit = rows == expected as usize;
    check.value(rows_fit, "blocks", format_args!("have {expected} rows"), rows)?;
    let (found, expected) = (options.blocks.key_blocks(), blocks.key_blocks());
    let expected_keys = format_args!("have {expected} blocks of keys");
    check.value(found == expected, "blocks", expected_keys, found)?;
    attend(arrays, heads, options)
}

/// [`block_sparse_attention`] of what has been checked.
pub(super) fn attend(
    arrays: [&Array; 3],
    heads: Heads,
    options: BlockSparseAttentionOptions,
) -> Result<Array> {
    let BlockSparseAttentionOptions { blocks, scale, causal, layout } = options;
    if is_empty(&heads) {
        return nothing(&heads, layout);
    }
    let swap = |array: &Array| layout.swap_with_bhsd(array)?.swap_axes(1, 2);
    let [queries, keys, values] = arrays;
    let gather = Gather {
        queries: swap(queries)?,
        keys: swap(keys)?,
        values: swap(values)?,
        heads,
        blocks: Blocks {
            // One block of each is no smaller for this, and needs no room for what is not there.
            block_size: blocks.block_size().min(heads.query_length.max(heads.key_length)),
            query_length: heads.query_length,
            key_length: heads.key_length,
        },
        rows: blocks.rows(),
        scale,
        hides: if causal { Hides::Later } else { Hides::Nothing },
    };
    Ok(layout.swap_with_bhsd(&gather.attend()?.swap_axes(1, 2)?)?)
}

/// Whether there is nothing to average, or nothing to fill.
pub(super) fn is_empty(heads: &Heads) -> bool {
    let Heads { batch, heads, query_length, key_length, value_size, .. } = *heads;
    [batch, heads, query_length, key_length, value_size].contains(&0)
}

pub(super) fn nothing(heads: &Heads, layout: Layout) -> Result<Array> {
    let shape = [heads.batch, heads.heads, heads.query_length, heads.value_size];
    Ok(layout.swap_with_bhsd(&zeros_dtype(&shape, heads.dtype)?)?)
}
