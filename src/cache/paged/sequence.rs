//! What a pool knows of one sequence.

use blake3::Hash;

/// A sequence of a pool. One that was closed has no successor of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    /// The blocks of its tokens, in order.
    pub(super) table: Vec<i32>,
    /// How many tokens are in some step, if not from a prompt before.
    pub(super) scheduled: usize,
    /// What stands before its first block.
    pub(super) root: Hash,
    /// Of its first blocks, as far as their keys and values are computed.
    pub(super) hashes: Vec<Hash>,
    /// How often tokens were taken back.
    pub(super) cuts: u64,
}

impl Sequence {
    pub(super) fn last_hash(&self) -> Hash {
        self.hashes.last().copied().unwrap_or(self.root)
    }

    /// Where the token at `position` lies.
    pub(super) fn slot(&self, position: usize, block_size: usize) -> i32 {
        let (block, place) = (position / block_size, position % block_size);
        self.table[block] * block_size as i32 + place as i32
    }
}
