//! Random operations against lists: nothing is lost, nothing leaks, every block is accounted for.
//!
//! Slots hold tokens here, and a step copies and writes them as it would keys and values.

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]
#![allow(clippy::print_stdout, reason = "the seed of a failure")]

use std::collections::{BTreeMap, HashMap};

use super::{Eviction, PagedPool, PagedPoolOptions, SequenceId, step::PagedStep};
use crate::splitmix::scramble;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 += 1;
        (scramble(self.0 << 20) % bound as u64) as usize
    }
}

/// A pool, the slots that its steps write, and lists of what sequences should hold.
struct Checked {
    pool: PagedPool,
    slots: Vec<Option<u32>>,
    lists: BTreeMap<SequenceId, List>,
}

#[derive(Clone)]
struct List {
    tokens: Vec<u32>,
    written: usize,
    salt: &'static [u8],
}

const BLOCKS: i32 = 24;
const BLOCK: usize = 4;
const SALTS: [&[u8]; 2] = [b"", b"other"];

impl Checked {
    fn new(eviction: Eviction) -> Self {
        let options = PagedPoolOptions {
            block_size: BLOCK as i32,
            eviction,
            salt: b"test".to_vec(),
            ..PagedPoolOptions::new(BLOCKS)
        };
        let slots = vec![None; BLOCKS as usize * BLOCK];
        Self { pool: PagedPool::new(options).unwrap(), slots, lists: BTreeMap::new() }
    }

    fn some(&self, random: &mut Random) -> Option<SequenceId> {
        let index = random.below(self.lists.len().max(1));
        self.lists.keys().nth(index).copied()
    }

    fn open(&mut self, random: &mut Random) {
        // Few different tokens, so that prompts often begin alike.
        let prompt: Vec<_> = (0..random.below(20)).map(|_| random.below(2) as u32).collect();
        let salt = SALTS[random.below(2)];
        let found = self.pool.longest_prefix(&prompt, salt);
        let id = self.pool.open(&prompt, salt).unwrap();
        let held = self.pool.len(id).unwrap();
        assert_eq!(held, found);
        assert!(held == 0 || (held as usize) < prompt.len());
        let tokens = prompt[..held as usize].to_vec();
        self.lists.insert(id, List { written: tokens.len(), tokens, salt });
    }

    fn append(&mut self, random: &mut Random) {
        let Some(id) = self.some(random) else { return };
        let tokens: Vec<_> = (0..random.below(9)).map(|_| random.below(2) as u32).collect();
        let (needed, before) = (self.pool.blocks_for(id, tokens.len()).unwrap(), self.accounts());
        match self.pool.append(id, &tokens) {
            Ok(()) => self.lists.get_mut(&id).unwrap().tokens.extend(tokens),
            Err(_) => {
                assert!(needed > self.pool.available_blocks());
                assert_eq!(self.accounts(), before);
            }
        }
    }

    fn fork(&mut self, random: &mut Random) {
        let Some(id) = self.some(random) else { return };
        let list = &self.lists[&id];
        let waits = list.written < list.tokens.len();
        match self.pool.fork(id) {
            Ok(twin) => {
                assert!(!waits);
                let list = list.clone();
                assert!(self.lists.insert(twin, list).is_none());
            }
            Err(_) => assert!(waits),
        }
    }

    fn truncate(&mut self, random: &mut Random) {
        let Some(id) = self.some(random) else { return };
        let list = self.lists.get_mut(&id).unwrap();
        let len = random.below(list.tokens.len() + 2);
        let cut = self.pool.truncate(id, len as i32);
        assert_eq!(cut.is_ok(), len <= list.tokens.len());
        list.tokens.truncate(len);
        list.written = list.written.min(len);
    }

    fn close(&mut self, id: SequenceId) {
        self.pool.close(id).unwrap();
        self.lists.remove(&id);
        assert!(self.pool.close(id).is_err() && self.pool.append(id, &[1]).is_err());
    }

    fn step(&mut self, random: &mut Random) {
        let waiting = self.lists.iter().filter(|(_, list)| list.written < list.tokens.len());
        let mut ids: Vec<_> = waiting.map(|(&id, _)| id).collect();
        ids.retain(|_| random.below(4) > 0);
        if ids.is_empty() {
            assert!(self.pool.step(&ids, 0).is_err());
            return;
        }
        let rows = random.below(40);
        let step = self.pool.step(&ids, rows).unwrap();
        self.run(&step);
        for id in &ids {
            let list = self.lists.get_mut(id).unwrap();
            list.written = list.tokens.len();
        }
        // Now and then the model fails, and nothing of it may be shared.
        if random.below(5) > 0 {
            self.pool.computed(&step).unwrap();
        } else {
            ids.into_iter().for_each(|id| self.close(id));
        }
    }

    fn run(&mut self, step: &PagedStep) {
        let before = self.slots.clone();
        if let Some([from, to]) = &step.copies {
            let copies = from.as_slice::<i32>().iter().zip(to.as_slice::<i32>());
            for (&from, &to) in copies.rev() {
                let [from, to] = [from, to].map(|block| block as usize * BLOCK);
                // What does not overlap may be copied where it lies, in any order.
                let source = if step.copies_overlap { &before } else { &self.slots };
                let source = source[from..from + BLOCK].to_vec();
                self.slots[to..to + BLOCK].copy_from_slice(&source);
            }
        }
        let (slots, positions) = (step.slots.as_slice::<i32>(), step.positions.as_slice::<i32>());
        let tokens = step.tokens().as_slice::<u32>();
        let last = step.query_starts().last().copied().unwrap() as usize;
        assert_eq!((slots.len(), positions.len()), (last, step.rows() as usize));
        assert_eq!(
            (tokens.len(), tokens[last..].iter().max().unwrap_or(&0)),
            (positions.len(), &0)
        );
        assert!(slots.iter().all(|&slot| slot >= BLOCK as i32), "the first block stays as it is");
        for (done, ends) in step.done().iter().zip(step.query_starts().windows(2)) {
            for row in ends[0] as usize..ends[1] as usize {
                let token = self.lists[&done.id].tokens[positions[row] as usize];
                assert_eq!(tokens[row], token);
                self.slots[slots[row] as usize] = Some(token);
            }
        }
    }

    fn accounts(&self) -> (usize, usize, usize) {
        let pool = &self.pool;
        (pool.used_blocks(), pool.idle_blocks(), pool.available_blocks())
    }

    fn check(&self) {
        let mut users: HashMap<i32, u32> = HashMap::new();
        for (&id, list) in &self.lists {
            assert_eq!(self.pool.tokens(id).unwrap(), list.tokens);
            let table = self.pool.table(id).unwrap();
            assert_eq!(table.len(), list.tokens.len().div_ceil(BLOCK));
            table.iter().for_each(|&block| *users.entry(block).or_default() += 1);
        }
        assert!(users.iter().all(|(&block, &count)| self.pool.blocks.users(block) == count));
        assert_eq!(users.len(), self.pool.used_blocks());
        assert_eq!(users.len() + self.pool.available_blocks(), BLOCKS as usize - 1);
        self.pool.blocks.assert_sound();
        if self.pool.copies.is_empty() {
            self.lists.iter().for_each(|(&id, list)| self.check_slots(id, list));
        }
    }

    /// What was written is where the table says.
    fn check_slots(&self, id: SequenceId, list: &List) {
        let table = self.pool.table(id).unwrap();
        for (position, &token) in list.tokens[..list.written].iter().enumerate() {
            let slot = table[position / BLOCK] as usize * BLOCK + position % BLOCK;
            assert_eq!(self.slots[slot], Some(token), "{id:?} at {position}");
        }
        let prompt = [&list.tokens[..], &[9]].concat();
        assert!(self.pool.longest_prefix(&prompt, list.salt) as usize <= list.tokens.len());
    }
}

fn policies() -> [Eviction; 4] {
    let scored = Eviction::AttentionScore { decay: 0.5 };
    let both = vec![(Eviction::Fifo, 0.5), (scored.clone(), 1.0), (Eviction::Lru, 0.1)];
    [Eviction::Lru, Eviction::Fifo, scored, Eviction::Composite(both)]
}

#[test]
fn random_operations_leave_it_equal_to_lists() {
    for (seed, eviction) in policies().into_iter().enumerate() {
        const OPERATIONS: usize = 25_000;
        println!("{OPERATIONS} operations of seed {seed}, {eviction:?}");
        let mut random = Random(seed as u64);
        let mut checked = Checked::new(eviction);
        for turn in 0..OPERATIONS {
            match random.below(12) {
                0 | 1 if checked.lists.len() > 12 => {
                    let id = checked.some(&mut random);
                    id.into_iter().for_each(|id| checked.close(id));
                }
                0 => checked.open(&mut random),
                1 => checked.fork(&mut random),
                2 => checked.truncate(&mut random),
                3 => {
                    let id = checked.some(&mut random);
                    id.into_iter().for_each(|id| checked.close(id));
                }
                4 => {
                    if let Some(id) = checked.some(&mut random) {
                        let drawn = random.below(100) as f32;
                        let blocks = checked.pool.table(id).unwrap().len();
                        checked.pool.credit(id, &vec![drawn; blocks]).unwrap();
                    }
                }
                5..8 => checked.append(&mut random),
                _ => checked.step(&mut random),
            }
            if turn % 16 == 0 {
                checked.check();
            }
        }
        let open: Vec<_> = checked.lists.keys().copied().collect();
        open.into_iter().for_each(|id| checked.close(id));
        assert_eq!(checked.pool.used_blocks(), 0);
        assert_eq!(checked.pool.available_blocks(), BLOCKS as usize - 1);
        checked.check();
    }
}

fn pool(blocks: i32) -> PagedPool {
    let options = PagedPoolOptions { block_size: 4, ..PagedPoolOptions::new(blocks) };
    PagedPool::new(options).unwrap()
}

fn refused<T: std::fmt::Debug>(result: crate::Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn bad_requests_are_refused_in_words_and_change_nothing() {
    let mut pool = pool(4);
    let id = pool.open(&[], b"").unwrap();
    assert_eq!(
        refused(pool.append(id, &[7; 13])),
        "[PagedPool] tokens must need at most the 3 blocks that can be given but got 4"
    );
    assert_eq!((pool.len(id).unwrap(), pool.used_blocks()), (0, 0));
    assert_eq!(
        refused(pool.step(&[id], 0)),
        "[PagedPool] sequence must have tokens to compute but got 0"
    );
    pool.append(id, &[7; 5]).unwrap();
    assert_eq!(
        refused(pool.fork(id)),
        "[PagedPool] sequence must have no appended tokens that are in no step yet but got 5"
    );
    assert_eq!(refused(pool.truncate(id, 6)), "[PagedPool] len must be between 0 and 5 but got 6");
    assert!(refused(pool.truncate(id, -1)).ends_with("but got -1"));
    assert!(
        refused(pool.step(&[id, id], 0)).starts_with("[PagedPool] sequences must be different")
    );
    assert!(refused(pool.step(&[], 0)).starts_with("[PagedPool] sequences must be one or more"));
    assert!(refused(pool.credit(id, &[1.0])).contains("one number for each of 2 blocks"));
    assert!(refused(pool.credit(id, &[1.0, f32::NAN])).contains("drawn must be finite"));
    pool.step(&[id], 0).unwrap();
    pool.close(id).unwrap();
    assert_eq!(refused(pool.len(id)), "[PagedPool] sequence must be open but got SequenceId(0)");
    for options in [
        PagedPoolOptions::new(1),
        PagedPoolOptions { block_size: 0, ..PagedPoolOptions::new(2) },
        PagedPoolOptions { block_size: 1 << 30, ..PagedPoolOptions::new(2) },
        PagedPoolOptions { eviction: Eviction::Composite(vec![]), ..PagedPoolOptions::new(2) },
    ] {
        assert!(PagedPool::new(options).is_err());
    }
}

#[test]
fn a_budget_of_bytes_is_a_number_of_blocks() {
    let blocks = |bytes| PagedPoolOptions::within(bytes, 100, 16).map(|options| options.blocks);
    assert_eq!(blocks(16 * 100 * 7 + 1599).unwrap(), 7);
    assert_eq!(
        refused(blocks(3199)),
        "[PagedPool] bytes must be room for 2 blocks of 1600 bytes or more but got 3199"
    );
    assert!(PagedPoolOptions::within(usize::MAX, 0, 16).is_err());
}

/// Opens a sequence on a prompt, computes all of it, and returns how many tokens were there before.
fn computed(pool: &mut PagedPool, prompt: &[u32], salt: &[u8]) -> (SequenceId, i32) {
    let id = pool.open(prompt, salt).unwrap();
    let found = pool.len(id).unwrap();
    pool.append(id, &prompt[found as usize..]).unwrap();
    let step = pool.step(&[id], 0).unwrap();
    pool.computed(&step).unwrap();
    (id, found)
}

#[test]
fn prompts_share_what_they_begin_with() {
    let mut pool = pool(16);
    let prompt: Vec<u32> = (0..10).collect();
    let (first, found) = computed(&mut pool, &prompt, b"");
    assert_eq!(found, 0);
    let (second, found) = computed(&mut pool, &prompt, b"");
    assert_eq!(found, 8, "two whole blocks");
    assert_eq!(pool.table(first).unwrap()[..2], pool.table(second).unwrap()[..2]);
    assert_eq!(computed(&mut pool, &prompt, b"another").1, 0);
    let (_, found) = computed(&mut pool, &[0, 1, 2, 3, 4, 5, 9, 9], b"");
    assert_eq!(found, 6, "one whole block, and half of the next, which is copied");
    assert_eq!(pool.copies, []);
    let sequences: Vec<_> = pool.sequences().collect();
    sequences.into_iter().for_each(|id| pool.close(id).unwrap());
    assert_eq!((pool.used_blocks(), pool.longest_prefix(&prompt, b"")), (0, 8));
    let (id, found) = computed(&mut pool, &prompt[..8], b"");
    assert_eq!(found, 7, "the last token is always computed");
    assert_eq!(pool.len(id).unwrap(), 8);
}

#[test]
fn nothing_is_shared_that_was_not_computed_or_was_taken_back() {
    let mut pool = pool(16);
    let prompt: Vec<u32> = (0..9).collect();
    let id = pool.open(&prompt, b"").unwrap();
    pool.append(id, &prompt).unwrap();
    let step = pool.step(&[id], 0).unwrap();
    assert_eq!(pool.longest_prefix(&prompt, b""), 0);
    pool.truncate(id, 6).unwrap();
    pool.append(id, &[6, 7]).unwrap();
    pool.computed(&step).unwrap();
    assert_eq!(pool.longest_prefix(&prompt, b""), 0);
    let step = pool.step(&[id], 0).unwrap();
    pool.computed(&step).unwrap();
    assert_eq!(pool.longest_prefix(&prompt, b""), 8);
    let apart = PagedPoolOptions { share_prefixes: false, ..PagedPoolOptions::new(4) };
    let mut apart = PagedPool::new(apart).unwrap();
    computed(&mut apart, &[1; 33], b"");
    assert_eq!(apart.longest_prefix(&[1; 33], b""), 0);
}

#[test]
fn a_full_pool_forgets_what_nobody_uses_and_nothing_else() {
    let mut pool = pool(4);
    let (old, _) = computed(&mut pool, &[1, 1, 1, 1, 2], b"");
    pool.close(old).unwrap();
    let (kept, _) = computed(&mut pool, &[3, 3, 3, 3], b"");
    assert_eq!((pool.used_blocks(), pool.idle_blocks()), (1, 1));
    let (new, _) = computed(&mut pool, &[5; 8], b"");
    assert_eq!((pool.used_blocks(), pool.available_blocks()), (3, 0));
    assert_eq!(pool.longest_prefix(&[1, 1, 1, 1, 2], b""), 0);
    assert!(pool.append(kept, &[4]).is_err());
    assert_eq!(pool.tokens(kept).unwrap(), [3; 4]);
    // Its last block is known, but there is no room for a copy.
    pool.truncate(new, 7).unwrap();
    pool.append(new, &[6]).unwrap();
    assert_eq!(pool.longest_prefix(&[5; 9], b""), 4);
}

#[test]
fn a_copy_of_what_is_still_to_be_copied_is_one_of_its_source() {
    let mut pool = pool(8);
    let (parent, _) = computed(&mut pool, &[1, 2], b"");
    let child = pool.fork(parent).unwrap();
    pool.append(child, &[3]).unwrap();
    pool.truncate(child, 2).unwrap();
    let grandchild = pool.fork(child).unwrap();
    pool.append(grandchild, &[4]).unwrap();
    let table = |id| pool.table(id).unwrap()[0];
    let [parent, child, grandchild] = [parent, child, grandchild].map(table);
    assert_eq!(pool.copies, [(parent, child), (parent, grandchild)]);
}
