//! The keys and values of one layer, in the blocks of a pool.

use mlx_rs::{Array, Dtype};

use super::{
    attend::{self, Appended},
    held::{self, Held},
    pool::{PagedPool, check_slots},
    sequence::SequenceId,
    step::{PagedStep, StepId},
    tokens::Tokens,
};
use crate::{
    attention::{BlockForm, FlashAttentionOptions, KvCache},
    check::Check,
    dispatch::{Context, Target},
    error::Result,
    kernel::Sole,
    layout::Layout,
    rope::{RopeOffset, RopeOptions},
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
    /// Of keys and values as they are written and read: f32, f16 or bf16.
    pub dtype: Dtype,
    /// How blocks hold keys.
    pub keys: BlockForm,
    /// How blocks hold values.
    pub values: BlockForm,
}

impl PagedKvOptions {
    pub(in crate::cache) fn check(&self) -> Result<()> {
        check_slots(CHECK, self.blocks, self.block_size)?;
        CHECK.at_least("num_kv_heads", self.num_kv_heads, 1)?;
        CHECK.at_least("head_dim", self.head_dim, 1)?;
        self.value_dim.map_or(Ok(()), |size| CHECK.at_least("value_dim", size, 1))?;
        CHECK.floating_dtype("dtype", self.dtype)
    }

    /// How many bytes a token takes.
    pub fn token_bytes(&self) -> usize {
        let size = |dim: i32| usize::try_from(dim).unwrap_or(0);
        let keys = self.keys.head_bytes(size(self.head_dim), self.dtype);
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        let values = self.values.head_bytes(size(value_dim), self.dtype);
        size(self.num_kv_heads).saturating_mul(keys.saturating_add(values))
    }
}

/// Keys and values of one layer for all sequences of a [`PagedPool`](super::PagedPool), allocated as a whole.
///
/// A step writes its tokens in place, as long as nobody else holds one of [`Self::arrays`], or what [`Self::key_blocks`] and
/// the like return, when it is evaluated; holding them is safe and costs a copy of the pool.
///
/// In blocks of 8 bits ([`BlockForm`]) a step's own tokens, too, are seen as the blocks hold them, so that a text does not
/// depend on how it was cut into steps. The kernel of [`paged_attention`](crate::attention::paged_attention) reads such blocks
/// as they are; where it does not run, as on a CPU, what a step sees is turned into numbers again for each step, which takes
/// time: there they save memory alone.
#[derive(Debug)]
pub struct PagedKv {
    /// Keys and values.
    held: [Held; 2],
    copied: Option<Copied>,
    /// The last step whose copies were made and whose tokens were written.
    applied: Option<StepId>,
    /// That nobody else ever holds one of these arrays.
    sole: Option<Sole>,
    /// Whether the last step was put together such that MLX copies no pool for it, whatever reads that when it is computed.
    in_place: bool,
}

/// What a step copies, gathered before.
#[derive(Debug)]
struct Copied {
    step: StepId,
    blocks: [Vec<Array>; 2],
}

impl PagedKv {
    /// Blocks of zeros.
    ///
    /// # Errors
    /// When a size is below one, there are fewer than two blocks or more than 2^31 - 1 slots, or `dtype` is none of f32, f16
    /// and bf16.
    pub fn new(options: &PagedKvOptions) -> Result<Self> {
        options.check()?;
        let &PagedKvOptions { blocks, block_size, num_kv_heads, head_dim, dtype, .. } = options;
        let value_dim = options.value_dim.unwrap_or(head_dim);
        let zeros = |form, size| Held::zeros(form, [blocks, block_size, num_kv_heads, size], dtype);
        let held = [zeros(options.keys, head_dim)?, zeros(options.values, value_dim)?];
        Ok(Self { held, copied: None, applied: None, sole: None, in_place: false })
    }

    /// The same, written in place also while the device still reads it for steps before, by a kernel where one runs: nobody may
    /// take an array of it from now on. A step must be computed, or given up together with these blocks, before another is handed
    /// over that does not depend on what it draws.
    pub(crate) fn sole(self, promise: Sole) -> Self {
        Self { sole: Some(promise), ..self }
    }

    pub(super) fn held(&self) -> &[Held; 2] {
        &self.held
    }

    /// The promise by which a kernel makes a step's copies and writes its tokens where they go, if one may.
    pub(super) fn writes_in_place(&self, step: &PagedStep, context: &Context) -> Option<Sole> {
        self.sole.filter(|_| held::can_be_written_in_place(context, &self.held, step))
    }

    /// Whether all tokens turn by the angles of our kernels, written in place or not: a text is not to depend on how it was cut
    /// into steps. Without a GPU there is one op for it.
    pub(super) fn turns_alike(&self, context: &Context) -> bool {
        self.sole.is_some() && context.target != Target::Cpu && context.obstacle.is_none()
    }

    /// Whether MLX copies no pool for the last step, whatever reads that when it is computed.
    pub(crate) fn was_written_in_place(&self) -> bool {
        self.in_place
    }

    /// `[BLOCKS, BLOCK, H_kv, D]`, of the dtype of their form.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn key_blocks(&self) -> Result<Array> {
        self.held[0].blocks()
    }

    /// `[BLOCKS, BLOCK, H_kv, D_v]`, of the dtype of their form.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn value_blocks(&self) -> Result<Array> {
        self.held[1].blocks()
    }

    /// `[BLOCKS, BLOCK, H_kv]`, f32: what the numbers of keys are multiplied by, unless they are plain.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn key_scales(&self) -> Result<Option<Array>> {
        self.held[0].scales()
    }

    /// Those of values, likewise.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn value_scales(&self) -> Result<Option<Array>> {
        self.held[1].scales()
    }

    /// All numbers and scales, as they are held, `[1, SLOTS, H_kv, _]` and `[1, SLOTS, H_kv]`: what a step leaves to be
    /// evaluated.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.held.iter().flat_map(Held::arrays)
    }

    /// The size of all arrays, in bytes.
    pub fn nbytes(&self) -> usize {
        self.arrays().map(Array::nbytes).sum()
    }

    /// Gathers the blocks that a step copies for sequences that have shared them so far, and returns them to be evaluated, of
    /// all layers at once. Most steps copy none, and where a kernel is likely to copy there is nothing to gather.
    ///
    /// This is for speed alone: what is read and written in one evaluation, MLX does not write in place, so a step whose copies
    /// were not evaluated before copies the pool.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn gather(&mut self, step: &PagedStep) -> Result<Vec<Array>> {
        let Some([from, _]) = &step.copies else { return Ok(Vec::new()) };
        // The kernel that wrote the last step may still run, and nothing that reads the blocks now would wait for it.
        if self.in_place {
            return Ok(Vec::new());
        }
        let blocks = self.gathered(from)?;
        self.copied = Some(Copied { step: step.id, blocks: blocks.clone() });
        Ok(blocks.concat())
    }

    /// The cache of this layer for one step: queries, keys and values are `[T, 1, heads, D]`, a row for each token.
    ///
    /// Steps must come in the order in which their pool made them, none left out. Its copies are made and its tokens written by
    /// the first call that attends; another call in the same step writes its own tokens in their place.
    pub fn layer<'a>(&'a mut self, step: &'a PagedStep) -> PagedLayer<'a> {
        PagedLayer { kv: self, step }
    }

    /// The keys and values of a sequence in numbers, `[1, S, H_kv, D]` and `[1, S, H_kv, D_v]`: what another cache goes on
    /// from, and what [`save_caches`](crate::cache::save_caches) takes in one. Every step of the pool must have been run here.
    ///
    /// # Errors
    /// When there is no such sequence, it has tokens that are in no step yet, or the pool has blocks of another size or more of
    /// them.
    pub fn read(&self, pool: &PagedPool, sequence: SequenceId) -> Result<(Array, Array)> {
        let (table, len) = (pool.written_table(sequence)?, pool.len(sequence)?);
        self.check_blocks("pool", [pool.blocks(), pool.block_size()])?;
        let table = uploads::integers(table);
        let [keys, values] = &self.held;
        Ok((keys.sequence(&table, len)?, values.sequence(&table, len)?))
    }

    /// Writes the keys and values of a step's tokens in numbers, `[T, 1, H_kv, D]` and `[T, 1, H_kv, D_v]`, that are known
    /// without a model: what [`Self::read`] or another cache held.
    ///
    /// # Errors
    /// When they do not fit the step or the blocks, or the step is of a pool with blocks of another size or more of them.
    /// Nothing is changed then.
    pub fn write(&mut self, step: &PagedStep, keys: &Array, values: &Array) -> Result<()> {
        self.check_tokens(step, keys, values, Layout::Bshd)?;
        let written = attend::with_tokens(&self.copied(step)?, step, [keys, values])?;
        (self.held, self.copied, self.applied) = (written, None, Some(step.id));
        Ok(())
    }

    /// Whether the tokens of a step were written before, and its copies made.
    pub(super) fn has_applied(&self, step: &PagedStep) -> bool {
        self.applied == Some(step.id)
    }

    /// The blocks with the copies of a step made.
    pub(super) fn copied(&self, step: &PagedStep) -> Result<[Held; 2]> {
        match &step.copies {
            // What they are copies of may have been overwritten by the tokens of the step.
            Some(copies) if !self.has_applied(step) => self.with_copies(step, copies),
            _ => Ok(self.held.clone()),
        }
    }

    fn with_copies(&self, step: &PagedStep, [from, to]: &[Array; 2]) -> Result<[Held; 2]> {
        let [keys, values] = &self.held;
        let [of_keys, of_values] =
            match self.copied.as_ref().filter(|copied| copied.step == step.id) {
                Some(copied) => copied.blocks.clone(),
                None => self.gathered(from)?,
            };
        Ok([keys.with_copies(to, of_keys)?, values.with_copies(to, of_values)?])
    }

    fn gathered(&self, from: &Array) -> Result<[Vec<Array>; 2]> {
        let [keys, values] = &self.held;
        Ok([keys.gathered(from)?, values.gathered(from)?])
    }

    /// Refuses tokens that are not those of the step, or do not fit the blocks.
    fn check(&self, step: &PagedStep, arrays: [&Array; 3], layout: Layout) -> Result<()> {
        let [queries, keys, values] = arrays;
        let [.., heads, size] = self.held[0].shape();
        CHECK.dtype_among("queries", queries, &[self.held[0].dtype()])?;
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
        for (name, array, held) in
            [("keys", keys, &self.held[0]), ("values", values, &self.held[1])]
        {
            let [.., heads, size] = held.shape();
            CHECK.dtype_among(name, array, &[held.dtype()])?;
            CHECK.shape(name, array, &layout.axes(step.rows(), 1, heads, size))?;
        }
        self.check_blocks("step", [step.blocks, step.block_size])
    }

    /// Refuses what knows of other blocks than these.
    fn check_blocks(&self, name: &'static str, [blocks, block_size]: [i32; 2]) -> Result<()> {
        let [most, size, ..] = self.held[0].shape();
        let expected = format_args!("have blocks of {size}");
        CHECK.value(block_size == size, name, expected, block_size)?;
        CHECK.value(blocks <= most, name, format_args!("have at most {most} blocks"), blocks)
    }
}

/// One layer's [`PagedKv`] and a step: what attention of that layer appends to in that step.
///
/// Masks, segments and dropout are refused: rows are tokens of sequences, and the step knows which sees which.
///
/// `Kernel` and `Reference` are those of [`paged_attention`](crate::attention::paged_attention); `Builtin` is MLX's fused
/// attention, over the keys and values of one sequence whose blocks lie in a row, and without soft cap, window, slopes and
/// sinks. On a GPU `Auto` goes there for halves in heads up to 128, else to the kernel.
///
/// On a GPU, an engine's layers [apply RoPE](KvCache::applies_rope): in the kernel that writes tokens to blocks, or by
/// [`rope_qk`](crate::rope::rope_qk)'s kernel, which computes the same angles.
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
        self.attend_to(&Tokens { queries, keys, values, rope: None }, &options)
    }

    fn applies_rope(&self) -> bool {
        Context::current().is_ok_and(|context| self.kv.turns_alike(&context))
    }

    fn attend_with_rope(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        rope: RopeOptions,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        let rope = Some(RopeOptions { layout: options.layout, ..rope });
        self.attend_to(&Tokens { queries, keys, values, rope }, &options)
    }
}

impl PagedLayer<'_> {
    fn attend_to(&mut self, tokens: &Tokens, options: &FlashAttentionOptions) -> Result<Array> {
        let (kv, step) = (&mut *self.kv, self.step);
        kv.check(step, [tokens.queries, tokens.keys, tokens.values], options.layout)?;
        attend::check(tokens.queries, options)?;
        let Appended { held, attended, in_place } =
            attend::append_and_attend(tokens, kv, step, options)?;
        (kv.held, kv.copied, kv.in_place) = (held, None, in_place);
        kv.applied = Some(step.id);
        Ok(attended)
    }
}
