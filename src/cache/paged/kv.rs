//! The keys and values of one layer, in the blocks of a pool.

use mlx_rs::{
    Array, Dtype,
    ops::{
        indexing::{TryIndexOp, scatter_single},
        zeros_dtype,
    },
};

use super::{
    attend,
    pool::{PagedPool, check_slots},
    sequence::SequenceId,
    step::PagedStep,
};
use crate::{
    attention::{FlashAttentionOptions, KvCache},
    check::Check,
    error::Result,
    layout::Layout,
    rope::RopeOffset,
    uploads,
};

pub(super) const CHECK: Check = Check::op("PagedKv");

/// Sizes of [`PagedKv`].
#[derive(Debug, Clone)]
pub struct PagedKvOptions {
    /// As [`PagedPoolOptions::blocks`](super::PagedPoolOptions::blocks).
    pub blocks: i32,
    /// As [`PagedPoolOptions::block_size`](super::PagedPoolOptions::block_size).
    pub block_size: i32,
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// The size of a key.
    pub head_dim: i32,
    /// The size of a value; that of a key by default.
    pub value_dim: Option<i32>,
    /// Of keys and values: f32, f16 or bf16.
    pub dtype: Dtype,
}

impl PagedKvOptions {
    /// How many bytes a token takes.
    pub fn token_bytes(&self) -> usize {
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        let size = |dim: i32| usize::try_from(dim).unwrap_or(0);
        let heads = size(self.num_kv_heads);
        heads.saturating_mul(size(self.head_dim) + size(value_dim)).saturating_mul(self.item_size())
    }

    fn item_size(&self) -> usize {
        if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }
}

/// Keys and values of one layer for all sequences of a [`PagedPool`](super::PagedPool), allocated as a whole.
///
/// A step writes its tokens in place, as long as nobody else holds what [`Self::key_blocks`] and [`Self::value_blocks`]
/// return when it is evaluated; holding them is safe and costs a copy of the pool.
#[derive(Debug)]
pub struct PagedKv {
    /// `[BLOCKS, BLOCK, H_kv, D]` and `[BLOCKS, BLOCK, H_kv, D_v]`.
    blocks: [Array; 2],
    copied: Option<Copied>,
}

/// What a step copies, gathered before.
#[derive(Debug)]
struct Copied {
    step: u64,
    blocks: [Array; 2],
}

impl PagedKv {
    /// Blocks of zeros.
    ///
    /// # Errors
    /// When a size is below one, there are fewer than two blocks or more than 2^31 - 1 slots, or `dtype` is none of f32, f16
    /// and bf16.
    pub fn new(options: &PagedKvOptions) -> Result<Self> {
        let &PagedKvOptions { blocks, block_size, num_kv_heads, head_dim, dtype, .. } = options;
        let value_dim = options.value_dim.unwrap_or(head_dim);
        check_slots(CHECK, blocks, block_size)?;
        CHECK.at_least("num_kv_heads", num_kv_heads, 1)?;
        CHECK.at_least("head_dim", head_dim, 1)?;
        CHECK.at_least("value_dim", value_dim, 1)?;
        CHECK.floating_dtype("dtype", dtype)?;
        let zeros = |size| zeros_dtype(&[blocks, block_size, num_kv_heads, size], dtype);
        Ok(Self { blocks: [zeros(head_dim)?, zeros(value_dim)?], copied: None })
    }

    /// `[BLOCKS, BLOCK, H_kv, D]`.
    pub fn key_blocks(&self) -> &Array {
        &self.blocks[0]
    }

    /// `[BLOCKS, BLOCK, H_kv, D_v]`.
    pub fn value_blocks(&self) -> &Array {
        &self.blocks[1]
    }

    /// The size of both arrays, in bytes.
    pub fn nbytes(&self) -> usize {
        self.blocks.iter().map(Array::nbytes).sum()
    }

    /// Gathers the blocks that a step copies for sequences that have shared them so far, and returns them to be evaluated, of
    /// all layers at once. Most steps copy none.
    ///
    /// This is for speed alone: what is read and written in one evaluation, MLX does not write in place, so a step whose copies
    /// were not evaluated before copies the pool.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn gather(&mut self, step: &PagedStep) -> Result<Vec<Array>> {
        let Some([from, _]) = &step.copies else { return Ok(Vec::new()) };
        let [keys, values] = &self.blocks;
        let blocks = [gathered(keys, from)?, gathered(values, from)?];
        self.copied = Some(Copied { step: step.number, blocks: blocks.clone() });
        Ok(blocks.into())
    }

    /// The cache of this layer for one step: queries, keys and values are `[T, 1, heads, D]`, a row for each token.
    pub fn layer<'a>(&'a mut self, step: &'a PagedStep) -> PagedLayer<'a> {
        PagedLayer { kv: self, step }
    }

    /// The keys and values of a sequence, `[1, S, H_kv, D]` and `[1, S, H_kv, D_v]`: what another cache goes on from, and
    /// what [`save_caches`](crate::cache::save_caches) takes in one.
    ///
    /// # Errors
    /// When there is no such sequence, or the pool is of other sizes.
    pub fn read(&self, pool: &PagedPool, sequence: SequenceId) -> Result<(Array, Array)> {
        let (table, len) = (pool.table(sequence)?, pool.len(sequence)?);
        self.check_block_size("pool", pool.block_size())?;
        let last = table.iter().copied().max().unwrap_or(0);
        let blocks = self.blocks[0].dim(0);
        CHECK.value(
            last < blocks,
            "pool",
            format_args!("have at most {blocks} blocks"),
            last + 1,
        )?;
        let table = uploads::integers(table.to_vec());
        let in_order = |blocks: &Array| -> Result<Array> {
            let blocks = blocks.take_axis(&table, 0)?;
            Ok(blocks.flatten(0, 1)?.try_index(..len)?.expand_dims(0)?)
        };
        let [keys, values] = &self.blocks;
        Ok((in_order(keys)?, in_order(values)?))
    }

    /// Writes the keys and values of a step's tokens, `[T, 1, H_kv, D]` and `[T, 1, H_kv, D_v]`, that are known without a
    /// model: what [`Self::read`] or another cache held.
    ///
    /// # Errors
    /// When they do not fit the step or the blocks. Nothing is changed then.
    pub fn write(&mut self, step: &PagedStep, keys: &Array, values: &Array) -> Result<()> {
        self.check_tokens(step, keys, values, Layout::Bshd)?;
        let written = self.written(step, [keys, values])?;
        (self.blocks, self.copied) = (written, None);
        Ok(())
    }

    /// The blocks with the copies of a step made and its tokens written.
    fn written(&self, step: &PagedStep, tokens: [&Array; 2]) -> Result<[Array; 2]> {
        let [keys, values] = match &step.copies {
            Some(copies) => self.copied(step, copies)?,
            None => self.blocks.clone(),
        };
        Ok([written(keys, step, tokens[0])?, written(values, step, tokens[1])?])
    }

    /// The blocks with the copies of a step made.
    fn copied(&self, step: &PagedStep, [from, to]: &[Array; 2]) -> Result<[Array; 2]> {
        let [keys, values] = self.blocks.clone();
        let copied = match self.copied.as_ref().filter(|copied| copied.step == step.number) {
            Some(copied) => copied.blocks.clone(),
            None => [gathered(&keys, from)?, gathered(&values, from)?],
        };
        let [of_keys, of_values] = copied;
        Ok([scatter_single(keys, to, of_keys, 0)?, scatter_single(values, to, of_values, 0)?])
    }

    /// Refuses tokens that are not those of the step, or do not fit the blocks.
    fn check(&self, step: &PagedStep, arrays: [&Array; 3], layout: Layout) -> Result<()> {
        let [queries, keys, values] = arrays;
        let [.., heads, size] = Layout::Bshd.dims(&self.blocks[0]);
        CHECK.dtype_among("queries", queries, &[self.blocks[0].dtype()])?;
        CHECK.shape("queries", queries, &layout.axes(step.rows(), 1, "H", size))?;
        let found = layout.dims(queries)[2];
        let expected = format_args!("have a multiple of H_kv = {heads} heads");
        CHECK.value(found % heads == 0, "queries", expected, found)?;
        self.check_tokens(step, keys, values, layout)
    }

    fn check_tokens(
        &self,
        step: &PagedStep,
        keys: &Array,
        values: &Array,
        layout: Layout,
    ) -> Result<()> {
        for (name, array, blocks) in
            [("keys", keys, &self.blocks[0]), ("values", values, &self.blocks[1])]
        {
            let [.., heads, size] = Layout::Bshd.dims(blocks);
            CHECK.dtype_among(name, array, &[blocks.dtype()])?;
            CHECK.shape(name, array, &layout.axes(step.rows(), 1, heads, size))?;
        }
        self.check_block_size("step", step.block_size)
    }

    fn check_block_size(&self, name: &'static str, found: i32) -> Result<()> {
        let block = self.blocks[0].dim(1);
        let expected = format_args!("have blocks of {block}");
        CHECK.value(found == block, name, expected, found)
    }
}

/// `[C, 1, BLOCK, H_kv, _]`: what a scatter writes over as many blocks.
fn gathered(blocks: &Array, from: &Array) -> Result<Array> {
    Ok(blocks.take_axis(from, 0)?.expand_dims(1)?)
}

/// `blocks`, `[BLOCKS, BLOCK, H_kv, _]`, with the tokens of a step, of rows of `[H_kv, _]`.
///
/// Each array is held by the next alone, so that MLX writes into the buffer of the first.
fn written(blocks: Array, step: &PagedStep, rows: &Array) -> Result<Array> {
    let shape = Layout::Bshd.dims(&blocks);
    let [.., heads, size] = shape;
    let rows = rows.reshape(&[step.rows(), 1, heads, size])?;
    let tokens = rows.try_index(..step.tokens())?;
    Ok(scatter_single(blocks.flatten(0, 1)?, &step.slots, tokens, 0)?.reshape(&shape)?)
}

/// One layer's [`PagedKv`] and a step: what attention of that layer appends to in that step.
///
/// Masks, segments and dropout are refused: rows are tokens of sequences, and the step knows which sees which.
///
/// `Kernel` and `Reference` are those of [`paged_attention`](crate::attention::paged_attention); `Builtin` is MLX's fused
/// attention, over the keys and values of one sequence whose blocks lie in a row, and without soft cap, window, slopes and
/// sinks. On a GPU `Auto` takes that one where it can, else the kernel.
#[derive(Debug)]
pub struct PagedLayer<'a> {
    kv: &'a mut PagedKv,
    step: &'a PagedStep,
}

impl KvCache for PagedLayer<'_> {
    fn offset(&self) -> RopeOffset<'_> {
        RopeOffset::PerRow(self.step.positions())
    }

    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        let (kv, step) = (&mut *self.kv, self.step);
        kv.check(step, [queries, keys, values], options.layout)?;
        attend::check(queries, &options)?;
        let written = kv.written(step, [keys, values])?;
        let [_, _, heads, size] = options.layout.dims(queries);
        let rows = queries.reshape(&[step.rows(), heads, size])?;
        let attended = attend::attend(&rows, &written, step, &options)?;
        let attended = attended.expand_dims(options.layout.sequence_axis())?;
        (kv.blocks, kv.copied) = (written, None);
        Ok(attended)
    }
}
