//! Random operations against lists: every text is read in order and whole, within the limits, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]
#![allow(clippy::print_stdout, reason = "a report of what random operations did")]

use std::collections::BTreeMap;

use super::*;
use crate::splitmix::scramble;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 += 1;
        (scramble(self.0) % bound as u64) as usize
    }
}

const BLOCK: usize = 4;
const BLOCKS: i32 = 17;
const LIMITS: Limits = Limits { sequences: 6, tokens: 20, chunk: 7, target: Target::Cpu };

/// What a text is made of, and how it ends.
struct Text {
    tokens: Vec<u32>,
    prompt: usize,
    wanted: usize,
}

/// A scheduler, and lists of what its texts should be.
struct Checked {
    scheduler: Scheduler,
    texts: BTreeMap<Key, Text>,
    requests: u64,
    random: Random,
    finished: usize,
    /// Tokens of drafts that were read, and that were right.
    guessed: usize,
    right: usize,
    /// Steps that were put together while another ran.
    ahead: usize,
}

/// What a trivial model says after a text.
fn next(text: &[u32], choice: u32) -> u32 {
    (scramble(text.iter().fold(choice.into(), |sum, &token| scramble(sum ^ u64::from(token)))) % 3)
        as u32
}

impl Checked {
    fn new(policy: Policy, seed: u64) -> Self {
        let options =
            PagedPoolOptions { block_size: BLOCK as i32, ..PagedPoolOptions::new(BLOCKS) };
        let scheduler = Scheduler::new(policy, LIMITS, options).unwrap();
        Self {
            scheduler,
            texts: BTreeMap::new(),
            requests: 0,
            random: Random(seed << 32),
            finished: 0,
            guessed: 0,
            right: 0,
            ahead: 0,
        }
    }

    fn submit(&mut self) {
        let prompt = (0..=self.random.below(24)).map(|_| self.random.below(2) as u32);
        let prompt = prompt.collect::<Vec<_>>();
        let siblings = if self.random.below(4) == 0 { self.random.below(3) as u32 } else { 0 };
        let wanted = 1 + self.random.below(12 / (1 + siblings as usize));
        // As the engine refuses what could never fit.
        let prompt = prompt[..prompt.len().min(60 / (1 + siblings as usize) - wanted)].to_vec();
        let key = Key { request: self.requests, choice: 0 };
        self.requests += 1;
        for choice in 0..=siblings {
            let text = Text { tokens: prompt.clone(), prompt: prompt.len(), wanted };
            self.texts.insert(Key { choice, ..key }, text);
        }
        let priority = self.random.below(3) as i32;
        self.scheduler.push(Branch::new(key, prompt.into(), priority, siblings));
    }

    fn cancel(&mut self) {
        let place = self.random.below(self.texts.len().max(1));
        let Some(request) = self.texts.keys().nth(place).map(|key| key.request) else { return };
        for choice in 0..3 {
            self.scheduler.remove(Key { request, choice }).unwrap();
        }
        self.texts.retain(|key, _| key.request != request);
    }

    fn step(&mut self) {
        let drafts = self.drafts();
        let Some(mut batch) = self.scheduler.schedule(&drafts).unwrap() else {
            assert!(self.texts.is_empty(), "texts are left and nothing is done");
            return;
        };
        self.check(&batch, &drafts);
        let drafted = batch.drawn.iter().any(|drawing| !drawing.drafts.is_empty());
        while !drafted && self.random.below(3) > 0 {
            let next = self.ahead(&batch);
            match self.random.below(20) {
                0 => self.cancel(),
                1..4 if self.texts.len() < 40 => self.submit(),
                _ => {}
            }
            self.advance(&batch);
            let Some(next) = next else { return };
            self.check(&next, &Drafts::new());
            (self.ahead, batch) = (self.ahead + 1, next);
        }
        self.advance(&batch);
    }

    /// The step after one that runs, of which it is known for half of the texts that end by it that they do.
    fn ahead(&mut self, batch: &Batch) -> Option<Batch> {
        let mut known = Vec::new();
        for Drawing { key, .. } in &batch.drawn {
            let Some(text) = self.texts.get(key) else { continue };
            if text.tokens.len() + 1 == text.prompt + text.wanted && self.random.below(2) == 0 {
                known.push(*key);
            }
        }
        self.scheduler.schedule_ahead(batch, |key| known.contains(&key)).unwrap()
    }

    fn advance(&mut self, batch: &Batch) {
        let said = batch.drawn.iter().map(|drawing| self.said(drawing)).collect::<Vec<_>>();
        self.scheduler.advance(batch, &said).unwrap();
        for (Drawing { key, drafts, .. }, said) in batch.drawn.iter().zip(said) {
            let Some(text) = self.texts.get_mut(key) else { continue };
            (self.guessed, self.right) = (self.guessed + drafts.len(), self.right + said.len() - 1);
            text.tokens.extend(said);
            if text.tokens.len() >= text.prompt + text.wanted {
                self.texts.remove(key);
                self.scheduler.remove(*key).unwrap();
                self.finished += 1;
            }
        }
    }

    /// Guesses for some of the texts that are written, each token right two times of three, or for one that is read.
    fn drafts(&mut self) -> Drafts {
        let keys = self.scheduler.writers().map(|branch| branch.key).collect::<Vec<_>>();
        let any = self.texts.keys().next().copied();
        let mut drafts = Drafts::new();
        for key in keys.into_iter().chain(any) {
            let text = &self.texts[&key];
            let (mut tokens, left) =
                (text.tokens.clone(), text.prompt + text.wanted - text.tokens.len());
            for _ in 0..self.random.below(left.min(6)) {
                let wrong = u32::from(self.random.below(3) == 0);
                tokens.push((next(&tokens, key.choice) + wrong) % 3);
            }
            drafts.insert(key, tokens[text.tokens.len()..].to_vec());
        }
        drafts
    }

    /// What the trivial model says after a text and its drafts, up to the first that is wrong; something else after one that
    /// has ended.
    fn said(&self, drawing: &Drawing) -> Vec<u32> {
        let Some(text) = self.texts.get(&drawing.key) else { return vec![99] };
        let mut tokens = text.tokens.clone();
        let known = tokens.len();
        for &draft in &drawing.drafts {
            let said = next(&tokens, drawing.key.choice);
            tokens.push(said);
            if said != draft {
                return tokens.split_off(known);
            }
        }
        tokens.push(next(&tokens, drawing.key.choice));
        tokens.split_off(known)
    }

    fn check(&self, batch: &Batch, drafts: &Drafts) {
        assert!((1..=LIMITS.tokens).contains(&batch.tokens.len()));
        assert!(self.scheduler.running.len() <= LIMITS.sequences);
        let starts = batch.step.query_starts();
        assert_eq!(*starts.last().unwrap(), batch.tokens.len() as i32);
        // A leader stands in a batch once, and before its siblings, which have no rows of their own.
        let readers =
            self.scheduler.running.iter().filter(|branch| batch.keys.contains(&branch.key));
        let readers = readers.filter(|branch| {
            let text = &self.texts[&branch.key];
            assert_eq!(branch.tokens(0, branch.len()), text.tokens, "{:?}", branch.key);
            let held = self.scheduler.pool.tokens(branch.sequence.unwrap()).unwrap();
            let mut drawn = batch.drawn.iter().filter(|drawing| drawing.key == branch.key);
            let drafts = drawn.next().map_or(&[][..], |drawing| &drawing.drafts);
            assert_eq!(held, &[&text.tokens, drafts].concat()[..held.len()], "{:?}", branch.key);
            true
        });
        let keys = batch.keys.iter().filter(|key| self.texts.contains_key(key));
        assert_eq!(readers.count(), keys.count());
        for drawing in &batch.drawn {
            let Some(text) = self.texts.get(&drawing.key) else { continue };
            let rows = drawing.rows().map(|row| batch.tokens[row as usize]).collect::<Vec<_>>();
            let awaited = batch.awaiting.contains(&(drawing.row, drawing.key));
            assert_eq!(rows[0], if awaited { AWAITED } else { *text.tokens.last().unwrap() });
            assert_eq!(rows[1..], drawing.drafts);
            let guessed = drafts.get(&drawing.key).map_or(&[][..], Vec::as_slice);
            assert!(guessed.starts_with(&drawing.drafts));
            let branch = self.scheduler.get(drawing.key).unwrap();
            assert_eq!(self.scheduler.unread(branch).unwrap().1, 0, "all of it is read");
        }
    }
}

#[test]
fn random_requests_are_read_in_order_and_leave_nothing_behind() {
    let policies = [Policy::Fcfs, Policy::Priority { ageing: 5 }, Policy::Priority { ageing: 0 }];
    for (seed, policy) in (1..).zip(policies) {
        const OPERATIONS: usize = 34_000;
        let mut checked = Checked::new(policy, seed);
        for _ in 0..OPERATIONS {
            match checked.random.below(10) {
                0..=2 if checked.texts.len() < 40 => checked.submit(),
                3 if checked.random.below(5) == 0 => checked.cancel(),
                4 if checked.random.below(200) == 0 => checked.scheduler.reset().unwrap(),
                _ => checked.step(),
            }
        }
        while !checked.texts.is_empty() {
            checked.step();
        }
        let Checked { scheduler, finished, guessed, right, ahead, .. } = checked;
        assert!(guessed > 15_000 && right > 7_000 && right < guessed, "{right} of {guessed}");
        assert_eq!(
            (scheduler.waiting(), scheduler.running(), scheduler.pool.used_blocks()),
            (0, 0, 0)
        );
        assert_eq!(scheduler.pool.available_blocks(), BLOCKS as usize - 1);
        let Counts { found, preempted, .. } = scheduler.counts;
        assert!(
            finished > 6_000 && found > 10_000 && preempted > 100,
            "{finished} {found} {preempted}"
        );
        assert!(ahead > 6_000, "{ahead}");
        println!(
            "{OPERATIONS} operations of seed {seed}: {finished} texts finished, {found} tokens found, {preempted} times \
             preempted, {right} of {guessed} guesses right, {ahead} steps ahead"
        );
    }
}

fn scheduler(policy: Policy, limits: Limits) -> Scheduler {
    let options = PagedPoolOptions { block_size: BLOCK as i32, ..PagedPoolOptions::new(BLOCKS) };
    Scheduler::new(policy, limits, options).unwrap()
}

fn branch(request: u64, len: usize, priority: i32) -> Branch {
    let prompt = (0..len as u32).map(|token| token + 100 * request as u32).collect::<Vec<_>>();
    Branch::new(Key { request, choice: 0 }, prompt.into(), priority, 0)
}

/// The requests of each of the next steps, with how many tokens they read.
fn steps(scheduler: &mut Scheduler, count: usize) -> Vec<Vec<(u64, i32)>> {
    let mut steps = Vec::new();
    for _ in 0..count {
        let batch = scheduler.schedule(&Drafts::new()).unwrap().unwrap();
        let reads = batch.step.query_starts().windows(2).map(|ends| ends[1] - ends[0]);
        steps.push(batch.keys.iter().map(|key| key.request).zip(reads).collect());
        scheduler.advance(&batch, &vec![vec![7]; batch.drawn.len()]).unwrap();
    }
    steps
}

#[test]
fn a_long_prompt_does_not_stall_those_that_write() {
    let mut scheduler = scheduler(Policy::Fcfs, LIMITS);
    scheduler.push(branch(0, 3, 0));
    assert_eq!(steps(&mut scheduler, 1), [[(0, 3)]]);
    scheduler.push(branch(1, 18, 0));
    assert_eq!(
        steps(&mut scheduler, 4),
        [vec![(0, 1), (1, 7)], vec![(0, 1), (1, 7)], vec![(0, 1), (1, 4)], vec![(0, 1), (1, 1)]],
    );
}

#[test]
fn the_highest_priority_goes_first_and_waiting_counts() {
    let limits = Limits { sequences: 1, ..LIMITS };
    let first = |ageing, steps_before: usize| {
        let mut scheduler = scheduler(Policy::Priority { ageing }, limits.clone());
        scheduler.push(branch(0, 2, 9));
        scheduler.push(branch(1, 2, 0));
        steps(&mut scheduler, steps_before);
        scheduler.push(branch(2, 2, 1));
        scheduler.remove(Key { request: 0, choice: 0 }).unwrap();
        steps(&mut scheduler, 1)[0][0].0
    };
    assert_eq!(first(0, 50), 2);
    assert_eq!(first(10, 5), 2);
    assert_eq!(first(10, 50), 1);
}

#[test]
fn rows_come_in_few_numbers() {
    let rows = [1, 2, 3, 33, 64, 65, 500].map(|tokens| rows_for(tokens, Target::Cuda));
    assert_eq!(rows, [1, 2, 4, 64, 64, 128, 512]);
    assert_eq!(rows_for(65, Target::Cpu), 65);
}
