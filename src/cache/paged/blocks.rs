//! Who uses which block of a pool.

use std::collections::HashMap;

use blake3::Hash;

use super::{
    eviction::{Eviction, History},
    prefix::{Content, Prefixes},
};

/// The block that no sequence has. It stays zero, and stands wherever there is none to name.
pub(super) const NONE: i32 = 0;

/// Blocks with counts of their users. One that has none is free, or idle if its content is known: then it is kept until
/// its room is needed.
#[derive(Debug)]
pub(super) struct Blocks {
    blocks: Vec<Block>,
    /// The next to be given out last.
    free: Vec<i32>,
    idle: usize,
    prefixes: Prefixes,
    eviction: Eviction,
    clock: u64,
}

#[derive(Debug, Default)]
struct Block {
    users: u32,
    content: Option<Content>,
    history: History,
}

impl Blocks {
    pub(super) fn new(count: usize, eviction: Eviction) -> Self {
        Self {
            blocks: (0..count).map(|_| Block::default()).collect(),
            free: (NONE + 1..count as i32).rev().collect(),
            idle: 0,
            prefixes: Prefixes::default(),
            eviction,
            clock: 0,
        }
    }

    /// How many can be given out.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// How many are kept for what they hold alone.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    /// How many are used.
    pub(super) fn used(&self) -> usize {
        self.blocks.len() - 1 - self.available()
    }

    pub(super) fn prefixes(&self) -> &Prefixes {
        &self.prefixes
    }

    pub(super) fn users(&self, block: i32) -> u32 {
        self.at(block).users
    }

    /// Whether its content is known, and so must stay.
    pub(super) fn is_known(&self, block: i32) -> bool {
        self.at(block).content.is_some()
    }

    /// That many blocks, each with one user, or nothing if there are fewer. Idle ones are let go as needed.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<i32>> {
        if count > self.available() {
            return None;
        }
        let missing = count.saturating_sub(self.free.len());
        self.evict(missing);
        let taken = self.free.split_off(self.free.len() - count);
        let now = self.tick();
        for &block in &taken {
            let history = History { filled: now, used: now, score: 0.0 };
            *self.at_mut(block) = Block { users: 1, content: None, history };
        }
        Some(taken.into_iter().rev().collect())
    }

    /// One more user of each.
    pub(super) fn share(&mut self, blocks: &[i32]) {
        let now = self.tick();
        for &block in blocks {
            let shared = self.at_mut(block);
            shared.users += 1;
            shared.history.used = now;
            let was_idle = shared.users == 1;
            self.idle -= usize::from(was_idle);
        }
    }

    /// One user less of each; those that are now free.
    pub(super) fn release(&mut self, blocks: &[i32]) -> Vec<i32> {
        let now = self.tick();
        let mut freed = Vec::new();
        for &block in blocks {
            let released = self.at_mut(block);
            released.users = released.users.saturating_sub(1);
            released.history.used = now;
            match (released.users, &released.content) {
                (0, None) => freed.push(block),
                (0, Some(_)) => self.idle += 1,
                _ => {}
            }
        }
        // The first to be freed is the next to be given out, so that runs stay runs.
        self.free.extend(freed.iter().rev());
        freed
    }

    /// Lets prompts find a used block by its content, unless they find another.
    pub(super) fn publish(&mut self, block: i32, content: Content) {
        if self.prefixes.knows(&content.hash) || self.is_known(block) {
            return;
        }
        self.prefixes.insert(block, &content);
        self.at_mut(block).content = Some(content);
    }

    /// Lets no prompt find a used block any more, so that it may be written.
    pub(super) fn withdraw(&mut self, block: i32) {
        if let Some(content) = self.at_mut(block).content.take() {
            self.prefixes.remove(block, &content);
        }
    }

    /// Moves the score of each block towards what it drew of late.
    pub(super) fn credit(&mut self, drawn: impl Iterator<Item = (i32, f32)>) {
        let Some(decay) = self.eviction.decay() else { return };
        for (block, drawn) in drawn {
            let score = &mut self.at_mut(block).history.score;
            *score = decay * *score + (1.0 - decay) * drawn;
        }
    }

    /// Frees that many idle blocks, which there must be, and of many some more: to rank them takes as long as there are.
    fn evict(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let count = count.max(self.idle / 16);
        for (block, _) in self.by_rank().into_iter().take(count) {
            self.withdraw(block);
            self.idle -= 1;
            self.free.push(block);
        }
    }

    /// The idle blocks, those to be let go first in front.
    fn by_rank(&self) -> Vec<(i32, f64)> {
        let known = |(index, block): (usize, &Block)| Some((index as i32, block.content.clone()?));
        let idle = self.blocks.iter().enumerate().filter(|(_, block)| block.users == 0);
        let mut idle: Vec<_> = idle.filter_map(known).collect();
        idle.sort_by_key(|(_, content)| std::cmp::Reverse(content.depth));
        let histories: Vec<_> = idle.iter().map(|&(block, _)| self.at(block).history).collect();
        let mut ranks = self.eviction.ranks(&histories);
        // None goes before one that is found by it.
        let mut of_followers: HashMap<Hash, f64> = HashMap::new();
        for ((_, content), rank) in idle.iter().zip(&mut ranks) {
            let least = of_followers.get(&content.hash).copied().unwrap_or(f64::NEG_INFINITY);
            *rank = rank.max(least);
            let parent = of_followers.entry(content.parent).or_insert(*rank);
            *parent = parent.max(*rank);
        }
        let mut ranked: Vec<_> = idle.iter().map(|&(block, _)| block).zip(ranks).collect();
        // Stable, so that among equals the deepest stay in front.
        ranked.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        ranked
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn at(&self, block: i32) -> &Block {
        &self.blocks[block as usize]
    }

    fn at_mut(&mut self, block: i32) -> &mut Block {
        &mut self.blocks[block as usize]
    }

    /// Panics unless every block is where its count says, and what is known is found.
    #[cfg(test)]
    pub(super) fn assert_sound(&self) {
        let known = |block: &&Block| block.content.is_some();
        let unused = |block: &&Block| block.users == 0;
        let blocks = self.blocks.iter().skip(1);
        assert_eq!(blocks.clone().filter(known).count(), self.prefixes.len());
        assert_eq!(blocks.clone().filter(unused).filter(known).count(), self.idle);
        assert_eq!(blocks.filter(unused).filter(|block| !known(block)).count(), self.free.len());
        let mut free = self.free.clone();
        free.sort_unstable();
        free.dedup();
        assert_eq!(free.len(), self.free.len());
        assert!(free.iter().all(|&block| self.users(block) == 0 && !self.is_known(block)));
        assert!(!free.contains(&NONE));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::prefix::root, *};

    fn published(blocks: &mut Blocks, count: usize) -> Vec<i32> {
        let taken = blocks.take(count).unwrap_or_default();
        let mut parent = root([b"", b""]);
        for (depth, &block) in taken.iter().enumerate() {
            let content = Content::new(parent, &[block as u32], depth);
            parent = content.hash;
            blocks.publish(block, content);
        }
        taken
    }

    #[test]
    fn runs_are_given_out_in_order() {
        let mut blocks = Blocks::new(6, Eviction::Lru);
        assert_eq!(blocks.take(3), Some(vec![1, 2, 3]));
        assert_eq!(blocks.take(3), None);
        assert_eq!(blocks.available(), 2);
        blocks.release(&[1, 2, 3]);
        assert_eq!(blocks.take(5), Some(vec![1, 2, 3, 4, 5]));
        blocks.assert_sound();
    }

    #[test]
    fn idle_blocks_go_from_the_end_of_a_chain_and_used_ones_never() {
        for eviction in [Eviction::Lru, Eviction::Fifo, Eviction::AttentionScore { decay: 0.0 }] {
            let mut blocks = Blocks::new(5, eviction);
            let chain = published(&mut blocks, 4);
            blocks.credit([(4, 1.0), (1, 0.5)].into_iter());
            blocks.release(&chain);
            blocks.share(&chain[..1]);
            assert_eq!((blocks.idle(), blocks.used()), (3, 1));
            assert_eq!(blocks.take(2), Some(vec![3, 4]));
            blocks.assert_sound();
            assert_eq!(blocks.take(2), None, "one is used, and one idle");
            assert_eq!(blocks.take(1), Some(vec![2]));
        }
    }

    #[test]
    fn one_of_two_equal_blocks_is_found() {
        let mut blocks = Blocks::new(4, Eviction::Lru);
        let pair = blocks.take(2).unwrap_or_default();
        let content = || Content::new(root([b"", b""]), &[7], 0);
        pair.iter().for_each(|&block| blocks.publish(block, content()));
        assert!(blocks.is_known(1) && !blocks.is_known(2));
        assert_eq!(blocks.release(&pair), [2]);
        assert_eq!((blocks.idle(), blocks.available()), (1, 3));
        blocks.assert_sound();
    }
}
