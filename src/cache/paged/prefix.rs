//! Full blocks by what they hold, and the longest beginning of a prompt that they hold together.
//!
//! A block is known by a hash of its tokens and of the block before it, so of the whole text up to its end. Those that
//! follow the same block are kept together: a tree whose edges are blocks, as long as all prompts share whole ones, and
//! at the end of a walk the child that shares the most tokens.

use std::collections::HashMap;

use blake3::{Hash, Hasher};

/// What a full block that may be shared holds.
#[derive(Debug, Clone)]
pub(super) struct Content {
    pub(super) hash: Hash,
    /// That of the block before it.
    pub(super) parent: Hash,
    pub(super) tokens: Box<[u32]>,
    /// How many blocks stand before it.
    pub(super) depth: usize,
}

impl Content {
    pub(super) fn new(parent: Hash, tokens: &[u32], depth: usize) -> Self {
        Self { hash: chained(parent, tokens), parent, tokens: tokens.into(), depth }
    }
}

fn chained(parent: Hash, tokens: &[u32]) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(parent.as_bytes());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize()
}

/// What stands before the first block of sequences that may share blocks with each other, and with no others.
pub(super) fn root(salts: [&[u8]; 2]) -> Hash {
    let mut hasher = Hasher::new();
    for salt in salts {
        hasher.update(&(salt.len() as u64).to_le_bytes());
        hasher.update(salt);
    }
    hasher.finalize()
}

/// The blocks that may be shared.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    by_hash: HashMap<Hash, i32>,
    /// By the hash of the block before.
    followers: HashMap<Hash, Vec<Follower>>,
}

/// A block and its tokens.
type Follower = (i32, Box<[u32]>);

/// A beginning of a prompt that blocks hold.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Shared {
    pub(super) blocks: Vec<i32>,
    /// Of the blocks that are shared as a whole; the last may be shared in part.
    pub(super) hashes: Vec<Hash>,
    pub(super) tokens: usize,
}

impl Prefixes {
    pub(super) fn knows(&self, hash: &Hash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// How many blocks there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        let followers = self.followers.values().map(Vec::len).sum::<usize>();
        assert_eq!(followers, self.by_hash.len());
        followers
    }

    pub(super) fn insert(&mut self, block: i32, content: &Content) {
        self.by_hash.insert(content.hash, block);
        let followers = self.followers.entry(content.parent).or_default();
        followers.push((block, content.tokens.clone()));
    }

    pub(super) fn remove(&mut self, block: i32, content: &Content) {
        self.by_hash.remove(&content.hash);
        let Some(followers) = self.followers.get_mut(&content.parent) else { return };
        followers.retain(|(follower, _)| *follower != block);
        if followers.is_empty() {
            self.followers.remove(&content.parent);
        }
    }

    /// The longest beginning of `tokens` after `root` that blocks of this size hold.
    pub(super) fn longest(&self, root: Hash, tokens: &[u32], block_size: usize) -> Shared {
        let mut shared = Shared::default();
        let mut parent = root;
        for whole in tokens.chunks_exact(block_size) {
            let hash = chained(parent, whole);
            let Some(&block) = self.by_hash.get(&hash) else { break };
            shared.blocks.push(block);
            shared.hashes.push(hash);
            shared.tokens += block_size;
            parent = hash;
        }
        let rest = tokens.get(shared.tokens..).unwrap_or_default();
        if let Some((block, common)) = self.closest(&parent, rest) {
            shared.blocks.push(block);
            shared.tokens += common;
        }
        shared
    }

    /// Which block after `parent` begins as `tokens` do for longest, and for how many.
    fn closest(&self, parent: &Hash, tokens: &[u32]) -> Option<(i32, usize)> {
        let common = |held: &[u32]| held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let followers = self.followers.get(parent)?.iter();
        let best = followers.map(|(block, held)| (*block, common(held))).max_by_key(|best| best.1);
        best.filter(|(_, common)| *common > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain of blocks of two from 1 on, which hold `tokens`.
    fn chain(prefixes: &mut Prefixes, first: i32, tokens: &[u32]) -> Vec<Content> {
        let mut parent = root([b"", b""]);
        let mut contents = Vec::new();
        for (depth, pair) in tokens.chunks_exact(2).enumerate() {
            let content = Content::new(parent, pair, depth);
            parent = content.hash;
            if !prefixes.knows(&parent) {
                prefixes.insert(first + depth as i32, &content);
            }
            contents.push(content);
        }
        contents
    }

    #[test]
    fn the_longest_beginning_may_end_inside_a_block() {
        let mut prefixes = Prefixes::default();
        chain(&mut prefixes, 1, &[5, 6, 7, 8]);
        chain(&mut prefixes, 3, &[5, 6, 9, 8]);
        let longest = |tokens: &[u32]| {
            let shared = prefixes.longest(root([b"", b""]), tokens, 2);
            (shared.blocks, shared.hashes.len(), shared.tokens)
        };
        assert_eq!(longest(&[5, 6, 7, 8, 1]), (vec![1, 2], 2, 4));
        assert_eq!(longest(&[5, 6, 9, 1]), (vec![1, 4], 1, 3));
        assert_eq!(longest(&[5, 6, 7]), (vec![1, 2], 1, 3));
        assert_eq!(longest(&[5]), (vec![1], 0, 1));
        assert_eq!(longest(&[6, 5]), (vec![], 0, 0));
        assert_eq!(longest(&[]), (vec![], 0, 0));
    }

    #[test]
    fn salts_keep_texts_apart() {
        let mut prefixes = Prefixes::default();
        chain(&mut prefixes, 1, &[5, 6]);
        assert_eq!(prefixes.longest(root([b"", b"a"]), &[5, 6], 2), Shared::default());
        assert_ne!(root([b"ab", b"c"]), root([b"a", b"bc"]));
    }

    #[test]
    fn what_is_removed_is_not_found() {
        let mut prefixes = Prefixes::default();
        let contents = chain(&mut prefixes, 1, &[5, 6, 7, 8]);
        prefixes.remove(2, &contents[1]);
        assert_eq!(prefixes.longest(root([b"", b""]), &[5, 6, 7, 8], 2).blocks, [1]);
        prefixes.remove(1, &contents[0]);
        assert_eq!(prefixes.len(), 0);
    }
}
