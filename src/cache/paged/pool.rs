//! The manager of blocks: sequences, their tables, and what they share.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    blocks::Blocks,
    eviction::Eviction,
    prefix::{Content, Shared, root},
    sequence::{Sequence, SequenceId},
    step::{PagedStep, Plan, StepId},
};
use crate::{check::Check, error::Result};

pub(super) const CHECK: Check = Check::op("PagedPool");

/// Options of [`PagedPool`].
#[derive(Debug, Clone)]
pub struct PagedPoolOptions {
    /// How many blocks there are, one of which no sequence gets: 2 or more.
    pub blocks: i32,
    /// How many tokens a block holds. Default: 16.
    pub block_size: i32,
    /// Whether sequences that begin alike share blocks. Default: yes.
    pub share_prefixes: bool,
    /// Part of every hash, so that what one pool's hashes are cannot be told from the tokens alone. Default: nothing.
    pub salt: Vec<u8>,
    /// Which block that nobody uses is let go first.
    pub eviction: Eviction,
}

impl PagedPoolOptions {
    /// The default of [`PagedPoolOptions::block_size`].
    pub const DEFAULT_BLOCK_SIZE: i32 = 16;

    /// A pool of this many blocks, and defaults otherwise.
    pub fn new(blocks: i32) -> Self {
        Self {
            blocks,
            block_size: Self::DEFAULT_BLOCK_SIZE,
            share_prefixes: true,
            salt: Vec::new(),
            eviction: Eviction::default(),
        }
    }

    /// As many blocks of `block_size` tokens as fit into `bytes`, if a token takes `token_bytes` in all layers together, and
    /// defaults otherwise.
    ///
    /// # Errors
    /// When `block_size` is below one, or there is room for less than two blocks, or for more than can be counted.
    pub fn within(bytes: usize, token_bytes: usize, block_size: i32) -> Result<Self> {
        CHECK.at_least("block_size", block_size, 1)?;
        let block = token_bytes.saturating_mul(block_size.unsigned_abs() as usize).max(1);
        let blocks = bytes / block;
        let expected = format_args!("be room for 2 blocks of {block} bytes or more");
        CHECK.value(blocks >= 2, "bytes", expected, bytes)?;
        let countable = i32::try_from(blocks).ok();
        let expected = "be room for at most 2147483647 blocks";
        let blocks = CHECK.known(countable, "bytes", expected, bytes)?;
        Ok(Self { block_size, ..Self::new(blocks) })
    }
}

/// Which sequence has which blocks of a pool. It holds no array: what it decides, [`PagedStep`] takes to the device.
///
/// Blocks are counted by their users. A fork shares all blocks with its parent, and whoever writes first into a shared
/// one gets a copy. Full blocks whose keys and values are computed are found by the prompts that begin with the same
/// tokens, also when their sequence is gone, until their room is needed; the policy says which go first. A block in use
/// is never let go.
///
/// Every call that fails leaves all as it was.
///
/// # Example
/// ```
/// use mlx_primitives::cache::{PagedPool, PagedPoolOptions};
///
/// let mut pool = PagedPool::new(PagedPoolOptions { block_size: 4, ..PagedPoolOptions::new(8) })?;
/// let prompt = [1, 2, 3, 4, 5, 6];
/// let first = pool.open(&prompt, b"")?;
/// pool.append(first, &prompt)?;
/// let step = pool.step(&[first], 0)?;
/// // ... the model runs ...
/// pool.computed(&step)?;
///
/// // The first block is shared; the rest is left to compute.
/// let second = pool.open(&prompt, b"")?;
/// assert_eq!(pool.len(second)?, 4);
/// pool.append(second, &prompt[4..])?;
/// assert_eq!(pool.used_blocks(), 3);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Kwon et al., [Efficient Memory Management for Large Language Model Serving with
/// PagedAttention](https://arxiv.org/abs/2309.06180), 2023; Zheng et al., [SGLang: Efficient Execution of Structured
/// Language Model Programs](https://arxiv.org/abs/2312.07104), 2023.
#[derive(Debug)]
pub struct PagedPool {
    options: PagedPoolOptions,
    /// No other pool has it.
    id: u64,
    pub(super) blocks: Blocks,
    pub(super) sequences: BTreeMap<SequenceId, Sequence>,
    opened: u64,
    steps: u64,
    /// Blocks to be copied, from and to, before anything is written by the next step.
    pub(super) copies: Vec<(i32, i32)>,
}

impl PagedPool {
    /// A pool in which all blocks are free.
    ///
    /// # Errors
    /// When there are fewer than two blocks, `block_size` is below one, there are more than 2^31 - 1 slots, or the policy
    /// has no meaning.
    pub fn new(options: PagedPoolOptions) -> Result<Self> {
        check_slots(CHECK, options.blocks, options.block_size)?;
        options.eviction.check(CHECK)?;
        let blocks = Blocks::new(options.blocks as usize, options.eviction.clone());
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (sequences, copies) = (BTreeMap::new(), Vec::new());
        Ok(Self { options, id, blocks, sequences, opened: 0, steps: 0, copies })
    }

    /// How many blocks there are, used or not.
    pub fn blocks(&self) -> i32 {
        self.options.blocks
    }

    /// How many tokens a block holds.
    pub fn block_size(&self) -> i32 {
        self.options.block_size
    }

    /// How many blocks sequences use.
    pub fn used_blocks(&self) -> usize {
        self.blocks.used()
    }

    /// How many blocks could be given to sequences now: those that are free, and those that are kept for what they hold.
    pub fn available_blocks(&self) -> usize {
        self.blocks.available()
    }

    /// How many blocks no sequence uses, and are kept in case that a prompt begins with them.
    pub fn idle_blocks(&self) -> usize {
        self.blocks.idle()
    }

    /// The sequences that are open.
    pub fn sequences(&self) -> impl Iterator<Item = SequenceId> {
        self.sequences.keys().copied()
    }

    /// How many of the first tokens of a prompt [`Self::open`] would find, which is never all of them: the last one must be
    /// computed, because what the model says after it is not kept.
    pub fn longest_prefix(&self, prompt: &[u32], salt: &[u8]) -> i32 {
        self.shared(prompt, salt).tokens as i32
    }

    /// Opens a sequence that holds as many of the first tokens of `prompt` as are there already, and returns its name. The
    /// others are to be appended. Sequences share blocks only with those of the same `salt`.
    ///
    /// # Errors
    /// When the prompt has more than 2^31 - 1 tokens.
    pub fn open(&mut self, prompt: &[u32], salt: &[u8]) -> Result<SequenceId> {
        let countable = i32::try_from(prompt.len()).is_ok();
        CHECK.value(countable, "prompt", "have at most 2147483647 tokens", prompt.len())?;
        let Shared { blocks, hashes, tokens } = self.shared(prompt, salt);
        self.blocks.share(&blocks);
        let root = self.root(salt);
        let (scheduled, tokens) = (tokens, prompt[..tokens].to_vec());
        Ok(self.insert(Sequence { tokens, table: blocks, scheduled, root, hashes, cuts: 0 }))
    }

    /// How many blocks a sequence would take for that many more tokens.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn blocks_for(&self, sequence: SequenceId, tokens: usize) -> Result<usize> {
        let (taken, copies) = self.needed(self.get(sequence)?, tokens);
        Ok(taken + usize::from(copies))
    }

    /// Gives a sequence room for more tokens, whose keys and values the next step will write.
    ///
    /// # Errors
    /// When there is no such sequence, or fewer blocks can be given than it needs.
    pub fn append(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        let sequence = self.get(id)?;
        let (grows, copies) = self.needed(sequence, tokens.len());
        let needed = grows + usize::from(copies);
        let last = sequence.table.last().copied().filter(|_| self.ends_inside(sequence));
        let available = self.blocks.available();
        let expected = format_args!("need at most the {available} blocks that can be given");
        let taken = CHECK.known(self.blocks.take(needed), "tokens", expected, needed)?;
        if let (true, Some(last)) = (!tokens.is_empty(), last) {
            match copies {
                true => self.copy(id, last, taken[0])?,
                false => self.blocks.withdraw(last),
            }
        }
        let sequence = self.get_mut(id)?;
        sequence.table.extend(&taken[usize::from(copies)..]);
        sequence.tokens.extend(tokens);
        Ok(())
    }

    /// Puts `token` in the place of what was appended at `position`, if the sequence goes that far. What it is in must not be
    /// [computed](Self::computed) yet.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub(crate) fn replace(&mut self, id: SequenceId, position: usize, token: u32) -> Result<()> {
        let block_size = self.options.block_size as usize;
        let sequence = self.get_mut(id)?;
        debug_assert!(position >= sequence.hashes.len() * block_size, "it is published");
        if let Some(place) = sequence.tokens.get_mut(position) {
            *place = token;
        }
        Ok(())
    }

    /// Takes back every token from position `len` on.
    ///
    /// # Errors
    /// When there is no such sequence, or `len` is negative or above its length.
    pub fn truncate(&mut self, id: SequenceId, len: i32) -> Result<()> {
        let held = self.get(id)?.tokens.len();
        let kept = usize::try_from(len).ok().filter(|&len| len <= held);
        let kept = CHECK.known(kept, "len", format_args!("be between 0 and {held}"), len)?;
        let block_size = self.options.block_size as usize;
        let sequence = self.get_mut(id)?;
        sequence.tokens.truncate(kept);
        sequence.scheduled = sequence.scheduled.min(kept);
        sequence.hashes.truncate(kept / block_size);
        sequence.cuts += u64::from(kept < held);
        let left = sequence.table.split_off(kept.div_ceil(block_size));
        self.release(&left);
        Ok(())
    }

    /// A second sequence that holds the same and goes on by itself.
    ///
    /// # Errors
    /// When there is no such sequence, or it has tokens that are in no step yet.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let twin = self.without_waiting(id)?.clone();
        self.blocks.share(&twin.table);
        Ok(self.insert(twin))
    }

    /// Forgets a sequence. Its blocks are free, but for those that others use or that are kept for what they hold.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn close(&mut self, id: SequenceId) -> Result<()> {
        self.get(id)?;
        if let Some(sequence) = self.sequences.remove(&id) {
            self.release(&sequence.table);
        }
        Ok(())
    }

    /// How many tokens a sequence has.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn len(&self, id: SequenceId) -> Result<i32> {
        Ok(self.get(id)?.tokens.len() as i32)
    }

    /// Whether no sequence is open.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The tokens of a sequence.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn tokens(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.get(id)?.tokens)
    }

    /// The blocks of a sequence, in order.
    ///
    /// # Errors
    /// When there is no such sequence.
    pub fn table(&self, id: SequenceId) -> Result<&[i32]> {
        Ok(&self.get(id)?.table)
    }

    /// The blocks in which the keys and values of a sequence are until the next step: not in copies that this is to make.
    ///
    /// # Errors
    /// When there is no such sequence, or it has tokens that are in no step yet.
    pub(super) fn written_table(&self, id: SequenceId) -> Result<Vec<i32>> {
        let table = self.without_waiting(id)?.table.iter();
        Ok(table.map(|&block| self.source(block)).collect())
    }

    /// Tells how much attention each block of a sequence drew, for [`Eviction::AttentionScore`].
    ///
    /// # Errors
    /// When there is no such sequence, or not one finite number for each of its blocks.
    pub fn credit(&mut self, id: SequenceId, drawn: &[f32]) -> Result<()> {
        let table = self.get(id)?.table.clone();
        let expected = format_args!("have one number for each of {} blocks", table.len());
        CHECK.value(drawn.len() == table.len(), "drawn", expected, drawn.len())?;
        drawn.iter().try_for_each(|&drawn| CHECK.finite("drawn", drawn))?;
        self.blocks.credit(table.into_iter().zip(drawn.iter().copied()));
        Ok(())
    }

    /// What a forward pass over all appended tokens of these sequences needs to know, in this order, with further rows of no
    /// sequence up to `rows`. The copies that forks and shared prompts have led to are part of it, whichever sequences they
    /// are for: a step that is made must be run, on every layer, and before the next.
    ///
    /// # Errors
    /// When there is no such sequence, one comes twice or has no tokens to compute, there is none, or MLX fails.
    pub fn step(&mut self, sequences: &[SequenceId], rows: usize) -> Result<PagedStep> {
        CHECK.value(!sequences.is_empty(), "sequences", "be one or more", 0)?;
        let PagedPoolOptions { blocks, block_size, .. } = self.options;
        let id = StepId { pool: self.id, number: self.steps };
        let mut plan = Plan::new(id, [blocks, block_size], self.copies.clone());
        for (index, &id) in sequences.iter().enumerate() {
            let sequence = self.get(id)?;
            let first = !sequences[..index].contains(&id);
            CHECK.value(first, "sequences", "be different ones", format_args!("{id:?} twice"))?;
            let waiting = sequence.tokens.len() - sequence.scheduled;
            CHECK.value(waiting > 0, "sequence", "have tokens to compute", waiting)?;
            plan.push(id, sequence);
        }
        let step = plan.upload(rows)?;
        self.copies.clear();
        self.steps += 1;
        for &id in sequences {
            let sequence = self.get_mut(id)?;
            sequence.scheduled = sequence.tokens.len();
        }
        Ok(step)
    }

    /// Tells that the keys and values of a step are computed, on every layer. Prompts find them from now on.
    ///
    /// # Errors
    /// When the step is of another pool.
    pub fn computed(&mut self, step: &PagedStep) -> Result<()> {
        let expected = "be one of this pool";
        CHECK.value(step.id.pool == self.id, "step", expected, "one of another")?;
        if self.options.share_prefixes {
            step.done().iter().for_each(|done| self.publish(done.id, done.cuts, done.len));
        }
        Ok(())
    }

    /// Publishes the full blocks among the first `len` tokens of a sequence, if none were taken back since.
    fn publish(&mut self, id: SequenceId, cuts: u64, len: usize) {
        let block_size = self.options.block_size as usize;
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.cuts != cuts {
            return;
        }
        for depth in sequence.hashes.len()..len / block_size {
            let tokens = &sequence.tokens[depth * block_size..(depth + 1) * block_size];
            let content = Content::new(sequence.last_hash(), tokens, depth);
            sequence.hashes.push(content.hash);
            self.blocks.publish(sequence.table[depth], content);
        }
    }

    fn shared(&self, prompt: &[u32], salt: &[u8]) -> Shared {
        let but_last = &prompt[..prompt.len().saturating_sub(1)];
        let block_size = self.options.block_size as usize;
        self.blocks.prefixes().longest(self.root(salt), but_last, block_size)
    }

    fn root(&self, salt: &[u8]) -> blake3::Hash {
        root([&self.options.salt, salt])
    }

    /// How many blocks `tokens` more begin, and whether the last block must be copied first.
    fn needed(&self, sequence: &Sequence, tokens: usize) -> (usize, bool) {
        let len = sequence.tokens.len().saturating_add(tokens);
        let grows = len.div_ceil(self.options.block_size as usize) - sequence.table.len();
        let Some(&last) = sequence.table.last() else { return (grows, false) };
        if tokens == 0 || !self.ends_inside(sequence) {
            return (grows, false);
        }
        let others = self.blocks.users(last) > 1;
        // What is known of it may as well be forgotten, if there is no room for another.
        let known = self.blocks.is_known(last) && self.blocks.available() > grows;
        (grows, others || known)
    }

    fn ends_inside(&self, sequence: &Sequence) -> bool {
        !sequence.tokens.len().is_multiple_of(self.options.block_size as usize)
    }

    /// Gives a sequence `to` in place of its last block, `from`.
    fn copy(&mut self, id: SequenceId, from: i32, to: i32) -> Result<()> {
        if let Some(last) = self.get_mut(id)?.table.last_mut() {
            *last = to;
        }
        // All copies of a step read before any writes: one of a copy is one of what that copies.
        let source = self.source(from);
        self.release(&[from]);
        self.copies.push((source, to));
        Ok(())
    }

    /// Where what a block is to hold is until the next step.
    fn source(&self, block: i32) -> i32 {
        let copy = self.copies.iter().find(|(_, to)| *to == block);
        copy.map_or(block, |&(from, _)| from)
    }

    /// Takes a user from each block. No copy is made into one that is free again, as its next user may ask for one.
    fn release(&mut self, blocks: &[i32]) {
        let freed = self.blocks.release(blocks);
        self.copies.retain(|(_, to)| !freed.contains(to));
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.opened);
        self.opened += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// A sequence whose tokens are all in some step.
    fn without_waiting(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.get(id)?;
        let waiting = sequence.tokens.len() - sequence.scheduled;
        let expected = "have no appended tokens that are in no step yet";
        CHECK.value(waiting == 0, "sequence", expected, waiting)?;
        Ok(sequence)
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let found = self.sequences.get(&id);
        CHECK.known(found, "sequence", "be open", format_args!("{id:?}"))
    }

    fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        let found = self.sequences.get_mut(&id);
        CHECK.known(found, "sequence", "be open", format_args!("{id:?}"))
    }
}

/// There are two blocks or more, and every slot has a number.
pub(super) fn check_slots(check: Check, blocks: i32, block_size: i32) -> Result<()> {
    check.at_least("blocks", blocks, 2)?;
    check.at_least("block_size", block_size, 1)?;
    let slots = blocks.checked_mul(block_size);
    let expected = format_args!("make at most 2147483647 slots of {block_size} each");
    check.known(slots, "blocks", expected, blocks).map(drop)
}
