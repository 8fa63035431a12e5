//! Which blocks of keys each block of queries sees.

use crate::{
    check::Check,
    error::Result,
    splitmix::{GOLDEN, scramble},
};

const CHECK: Check = Check::op("BlockLayout");

/// Which blocks of keys each block of queries sees: plain data, without arrays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    block_size: i32,
    key_blocks: i32,
    rows: Vec<Vec<i32>>,
}

impl BlockLayout {
    /// A layout of these rows, one for each block of queries, which list blocks of keys in any order; what a row lists
    /// twice is seen once.
    ///
    /// # Errors
    /// When `block_size` is below one, when `key_blocks` is negative, or when a row lists a block that is not in
    /// `0..key_blocks`.
    ///
    /// # Example
    /// ```
    /// use mlx_primitives::attention::BlockLayout;
    ///
    /// let layout = BlockLayout::new(64, 3, vec![vec![0], vec![1, 0], vec![2, 0]])?;
    /// assert_eq!(layout.rows()[1], [0, 1]);
    /// # Ok::<(), mlx_primitives::Error>(())
    /// ```
    pub fn new(block_size: i32, key_blocks: i32, rows: Vec<Vec<i32>>) -> Result<Self> {
        CHECK.at_least("block_size", block_size, 1)?;
        CHECK.at_least("key_blocks", key_blocks, 0)?;
        for &block in rows.iter().flatten() {
            let expected = format_args!("list blocks from 0 to below {key_blocks}");
            CHECK.value((0..key_blocks).contains(&block), "rows", expected, block)?;
        }
        Ok(Self { block_size, key_blocks, rows: rows.into_iter().map(sorted).collect() })
    }

    /// How many queries, and how many keys, are in a block; the last of either may have fewer.
    pub fn block_size(&self) -> i32 {
        self.block_size
    }

    /// How many blocks of keys there are.
    pub fn key_blocks(&self) -> i32 {
        self.key_blocks
    }

    /// For each block of queries, the blocks of keys that it sees, in rising order.
    pub fn rows(&self) -> &[Vec<i32>] {
        &self.rows
    }
}

fn sorted(mut row: Vec<i32>) -> Vec<i32> {
    row.sort_unstable();
    row.dedup();
    row
}

/// A rule that makes a [`BlockLayout`] of any length: neighbours, blocks that all see, and random ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockPattern {
    /// How many blocks before its own a block sees, from 0. Default: 1.
    pub before: i32,
    /// How many blocks after its own a block sees, from 0. Default: 1.
    pub after: i32,
    /// How many of the first blocks see every block and are seen by every block, from 0. Default: 1.
    pub global_blocks: i32,
    /// How many further blocks each block sees, drawn from those that it would not see otherwise, from 0. Default: 0.
    pub random_blocks: i32,
    /// What the draws depend on, and nothing else. Default: 0.
    pub seed: u64,
    /// Whether a block sees none that is wholly after it. Default: no.
    pub causal: bool,
}

impl Default for BlockPattern {
    fn default() -> Self {
        Self { before: 1, after: 1, global_blocks: 1, random_blocks: 0, seed: 0, causal: false }
    }
}

impl BlockPattern {
    /// The layout for these lengths, where the last query stands at the last key: a block's own are those that hold the
    /// keys at the positions of its queries.
    ///
    /// # Errors
    /// When `block_size` is below one, or when a length or a count is negative.
    ///
    /// # Example
    /// ```
    /// use mlx_primitives::attention::BlockPattern;
    ///
    /// let layout = BlockPattern::default().layout(64, 320, 320)?;
    /// assert_eq!(layout.rows()[3], [0, 2, 3, 4]);
    /// # Ok::<(), mlx_primitives::Error>(())
    /// ```
    pub fn layout(
        &self,
        block_size: i32,
        query_length: i32,
        key_length: i32,
    ) -> Result<BlockLayout> {
        let check = Check::op("BlockPattern");
        self.check(check, block_size)?;
        check.at_least("query_length", query_length, 0)?;
        check.at_least("key_length", key_length, 0)?;
        Ok(self.rows(Blocks { block_size, query_length, key_length }))
    }

    pub(crate) fn check(&self, check: Check, block_size: i32) -> Result<()> {
        check.at_least("block_size", block_size, 1)?;
        check.at_least("before", self.before, 0)?;
        check.at_least("after", self.after, 0)?;
        check.at_least("global_blocks", self.global_blocks, 0)?;
        check.at_least("random_blocks", self.random_blocks, 0)
    }

    /// The layout, once all has been checked.
    pub(super) fn rows(&self, blocks: Blocks) -> BlockLayout {
        let rows = (0..blocks.query_blocks()).map(|row| self.row(row, blocks)).collect();
        BlockLayout { block_size: blocks.block_size, key_blocks: blocks.key_blocks(), rows }
    }

    fn row(&self, row: i32, blocks: Blocks) -> Vec<i32> {
        let own = blocks.own(row);
        let count = i64::from(blocks.key_blocks());
        let end = if self.causal { count.min(own.end) } else { count }.max(0);
        let global = i64::from(self.global_blocks).min(end);
        if own.end > 0 && own.start < global && global > 0 {
            return (0..end as i32).collect();
        }
        let near = (own.start - i64::from(self.before)).max(global)
            ..(own.end + i64::from(self.after)).min(end);
        let mut seen: Vec<_> = (0..global).chain(near.clone()).map(|block| block as i32).collect();
        // What is not seen stands between the first blocks and the near ones, and after those.
        let between = (near.start.min(end) - global).max(0);
        let beyond = near.end.max(near.start);
        let after = (end - beyond).max(0);
        for place in chosen(between + after, self.random_blocks, self.seed, row) {
            let block = if place < between { global + place } else { beyond + place - between };
            seen.push(block as i32);
        }
        sorted(seen)
    }
}

/// The lengths a pattern is laid over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    pub(super) block_size: i32,
    pub(super) query_length: i32,
    pub(super) key_length: i32,
}

impl Blocks {
    pub(super) fn query_blocks(self) -> i32 {
        count(self.query_length, self.block_size)
    }

    pub(super) fn key_blocks(self) -> i32 {
        count(self.key_length, self.block_size)
    }

    /// The blocks of keys at the positions of a block of queries; outside of all blocks where there are no such keys.
    fn own(self, row: i32) -> std::ops::Range<i64> {
        let size = i64::from(self.block_size);
        let lead = i64::from(self.key_length) - i64::from(self.query_length);
        let first = i64::from(row) * size;
        let last = (first + size).min(self.query_length.into()) - 1;
        (first + lead).div_euclid(size)..(last + lead).div_euclid(size) + 1
    }
}

fn count(length: i32, block_size: i32) -> i32 {
    length / block_size + i32::from(length % block_size != 0)
}

/// Up to `count` different numbers below `bound`, all choices being alike.
///
/// By Floyd: a number that was drawn already stands for the largest allowed, which was not.
fn chosen(bound: i64, count: i32, seed: u64, row: i32) -> Vec<i64> {
    let stream = scramble(seed).wrapping_add((row as u64).wrapping_mul(GOLDEN));
    let mut state = scramble(stream);
    let mut drawn = Vec::new();
    for largest in bound - bound.min(count.into())..bound {
        state = scramble(state);
        let place = (state % (largest as u64 + 1)) as i64;
        drawn.push(if drawn.contains(&place) { largest } else { place });
    }
    drawn
}
