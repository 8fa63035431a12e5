//! Which tokens the model reads next.

mod branch;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, collections::BTreeMap};

use self::branch::Awaited;
pub(crate) use self::branch::{AWAITED, Branch, Key};
use crate::{
    cache::{PagedPool, PagedPoolOptions, PagedStep, SequenceId},
    check::Check,
    dispatch::Target,
    error::Result,
};

const CHECK: Check = Check::op("GenerationEngine");

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Policy {
    /// Whoever came first.
    #[default]
    Fcfs,
    /// The highest priority, and of equal ones whoever came first.
    Priority {
        /// For every so many steps since it was submitted a request counts as one higher, so that no one waits forever; 0 for never.
        ageing: u64,
    },
}

/// What bounds a step.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Sequences that run at once.
    pub(crate) sequences: usize,
    /// Tokens of one step.
    pub(crate) tokens: usize,
    /// Tokens of one prompt in one step.
    pub(crate) chunk: usize,
    /// Where steps run.
    pub(crate) target: Target,
}

/// The tokens of one step, one sequence after another.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) step: PagedStep,
    /// A token for each row of a sequence; [`AWAITED`] where the step before still draws it.
    pub(crate) tokens: Vec<u32>,
    /// The rows whose token is awaited, in order, and of which texts.
    pub(crate) awaiting: Vec<(i32, Key)>,
    /// The texts that go on after this step.
    pub(crate) drawn: Vec<Drawing>,
    /// Every text that is in this step, in order.
    pub(crate) keys: Vec<Key>,
}

/// A text that goes on after a step.
#[derive(Debug, Clone)]
pub(crate) struct Drawing {
    pub(crate) key: Key,
    /// That of its last token.
    pub(crate) row: i32,
    /// Guesses of the next tokens, in the rows after that.
    pub(crate) drafts: Vec<u32>,
}

impl Drawing {
    /// The rows after each of which a token may be drawn.
    pub(crate) fn rows(&self) -> impl Iterator<Item = i32> {
        self.row..=self.row + self.drafts.len() as i32
    }
}

/// Guesses of how texts that are being written go on.
pub(crate) type Drafts = BTreeMap<Key, Vec<u32>>;

impl Batch {
    /// The requests whose texts are in this step.
    pub(crate) fn requests(&self) -> Vec<u64> {
        let mut requests = self.keys.iter().map(|key| key.request).collect::<Vec<_>>();
        requests.dedup();
        requests
    }
}

/// Puts steps together: whoever writes gets a token in each, and what the budget leaves goes to prompts, a chunk at a time.
///
/// Where blocks run short, the text that is last in order waits and is read again later; its blocks are found again by
/// what they hold, unless they were needed. It knows no array but the step's.
#[derive(Debug)]
pub(crate) struct Scheduler {
    policy: Policy,
    limits: Limits,
    options: PagedPoolOptions,
    pool: PagedPool,
    /// In no order.
    waiting: Vec<Branch>,
    /// The first goes first.
    running: Vec<Branch>,
    steps: u64,
    pub(crate) counts: Counts,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Tokens of prompts that were read, and that were found to be read already.
    pub(crate) read: u64,
    pub(crate) found: u64,
    /// Times that a running text had to wait.
    pub(crate) preempted: u64,
}

/// The part of a step that is planned.
#[derive(Debug, Default)]
struct Plan {
    sequences: Vec<SequenceId>,
    keys: Vec<Key>,
    tokens: Vec<u32>,
    awaiting: Vec<(i32, Key)>,
    /// Which of the sequences are read to the end, and on.
    ends: Vec<(usize, Vec<u32>)>,
}

impl Scheduler {
    pub(crate) fn new(policy: Policy, limits: Limits, options: PagedPoolOptions) -> Result<Self> {
        let pool = PagedPool::new(options.clone())?;
        let (waiting, running, counts) = (Vec::new(), Vec::new(), Counts::default());
        Ok(Self { policy, limits, options, pool, waiting, running, steps: 0, counts })
    }

    pub(crate) fn pool(&self) -> &PagedPool {
        &self.pool
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn push(&mut self, branch: Branch) {
        self.waiting.push(Branch { since: self.steps, ..branch });
    }

    pub(crate) fn get(&self, key: Key) -> Option<&Branch> {
        self.running.iter().chain(&self.waiting).find(|branch| branch.key == key)
    }

    /// The texts that will get a token in the next step, unless blocks run short.
    pub(crate) fn writers(&self) -> impl Iterator<Item = &Branch> {
        self.running
            .iter()
            .filter(|branch| self.unread(branch).is_ok_and(|(_, unread)| unread == 1))
    }

    /// The next step, if anything is left to do. It reads as much of the drafts as there is room for.
    pub(crate) fn schedule(&mut self, drafts: &Drafts) -> Result<Option<Batch>> {
        self.steps += 1;
        loop {
            let plan = self.plan(drafts)?;
            if !plan.sequences.is_empty() {
                return self.batch(plan).map(Some);
            }
            // Some hold blocks that each other need: the last gives its own back.
            let Some(last) = self.running.pop() else { return Ok(None) };
            self.preempt(last)?;
        }
    }

    /// The step after `batch`, which has no drafts, before [`Self::advance`] is told what that draws; `is_last` says for which
    /// texts it draws the last token. None where nothing is left to do, or where blocks are so few that somebody might have
    /// to give his back.
    pub(crate) fn schedule_ahead(
        &mut self,
        batch: &Batch,
        is_last: impl Fn(Key) -> bool,
    ) -> Result<Option<Batch>> {
        // A token takes a block at most.
        if self.pool.available_blocks() < self.running.len() {
            return Ok(None);
        }
        for Drawing { key, .. } in &batch.drawn {
            let running = self.running.iter_mut().find(|branch| branch.key == *key);
            running.into_iter().for_each(|branch| branch.await_token(is_last(*key)));
        }
        let plan = self.plan(&Drafts::new())?;
        if plan.sequences.is_empty() {
            return Ok(None);
        }
        self.steps += 1;
        self.batch(plan).map(Some)
    }

    fn plan(&mut self, drafts: &Drafts) -> Result<Plan> {
        let mut plan = Plan::default();
        self.plan_writers(drafts, &mut plan)?;
        self.plan_readers(&mut plan)?;
        self.admit(&mut plan)?;
        Ok(plan)
    }

    /// Takes in what was drawn after a batch, for each text in [`Batch::drawn`] its drafts up to the first that is wrong, and
    /// a token after that.
    pub(crate) fn advance(&mut self, batch: &Batch, tokens: &[Vec<u32>]) -> Result<()> {
        self.pool.computed(&batch.step)?;
        for (drawing, tokens) in batch.drawn.iter().zip(tokens) {
            let running = self.running.iter_mut().find(|branch| branch.key == drawing.key);
            let Some(branch) = running else { continue };
            if let (Some(place), Some(&token)) = (branch.go_on(tokens), tokens.first()) {
                self.pool.replace(sequence(branch)?, place, token)?;
            }
            if !drawing.drafts.is_empty() {
                // The last one is not read.
                let read = branch.len() - 1;
                self.pool.truncate(sequence(branch)?, read as i32)?;
            }
        }
        Ok(())
    }

    /// Forgets a text.
    pub(crate) fn remove(&mut self, key: Key) -> Result<Option<Branch>> {
        if let Some(place) = self.waiting.iter().position(|branch| branch.key == key) {
            return Ok(Some(self.waiting.swap_remove(place)));
        }
        let Some(place) = self.running.iter().position(|branch| branch.key == key) else {
            return Ok(None);
        };
        let branch = self.running.remove(place);
        self.pool.close(sequence(&branch)?)?;
        Ok(Some(branch))
    }

    /// Has every text wait, and begins with an empty pool: what the blocks hold is lost, and what a step would have drawn.
    pub(crate) fn reset(&mut self) -> Result<()> {
        self.pool = PagedPool::new(self.options.clone())?;
        for mut branch in std::mem::take(&mut self.running) {
            branch.go_on(&[]);
            self.waiting.push(Branch { sequence: None, ..branch });
        }
        Ok(())
    }

    /// A token for each text that is being written, and of its drafts what leaves the others room for theirs.
    fn plan_writers(&mut self, drafts: &Drafts, plan: &mut Plan) -> Result<()> {
        let mut place = 0;
        while place < self.running.len() && plan.tokens.len() < self.limits.tokens {
            let branch = &self.running[place];
            let (sequence, unread) = self.unread(branch)?;
            if unread != 1 || plan.sequences.contains(&sequence) {
                place += 1;
                continue;
            }
            // Those that begin where the prompt ends have no part in a draft.
            let drafts = drafts.get(&branch.key).filter(|_| branch.siblings == 0);
            let drafts = drafts.map_or(&[][..], Vec::as_slice);
            if self.make_room(place, sequence)? {
                let others = self.running.len() - place - 1;
                let budget = self.limits.tokens - plan.tokens.len();
                let wanted = budget.saturating_sub(others).min(1 + drafts.len());
                let blocks = self.pool.available_blocks().saturating_sub(others);
                let count = self.fitting(sequence, wanted, blocks)?.max(1);
                self.take(place, 1, &drafts[..count - 1], plan)?;
                place += 1;
            }
        }
        Ok(())
    }

    /// Makes room for a token by having those wait that come after; or, where none do, the text itself.
    fn make_room(&mut self, place: usize, sequence: SequenceId) -> Result<bool> {
        while self.pool.blocks_for(sequence, 1)? > self.pool.available_blocks() {
            let last = self.running.pop();
            let itself = self.running.len() == place;
            last.map_or(Ok(()), |branch| self.preempt(branch))?;
            if itself {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Chunks of the prompts that are being read.
    fn plan_readers(&mut self, plan: &mut Plan) -> Result<()> {
        for place in 0..self.running.len() {
            self.plan_reader(place, plan)?;
        }
        Ok(())
    }

    fn plan_reader(&mut self, place: usize, plan: &mut Plan) -> Result<()> {
        let (sequence, unread) = self.unread(&self.running[place])?;
        let budget = self.limits.tokens - plan.tokens.len();
        let wanted = unread.min(budget).min(self.limits.chunk);
        if wanted == 0 || plan.sequences.contains(&sequence) {
            return Ok(());
        }
        let chunk = self.fitting(sequence, wanted, self.pool.available_blocks())?;
        if chunk == 0 { Ok(()) } else { self.take(place, chunk, &[], plan) }
    }

    /// How many of that many tokens there is room for in so many blocks.
    fn fitting(&self, sequence: SequenceId, wanted: usize, available: usize) -> Result<usize> {
        let (mut fits, mut above) = (0, wanted + 1);
        while above - fits > 1 {
            let middle = fits.midpoint(above);
            match self.pool.blocks_for(sequence, middle)? <= available {
                true => fits = middle,
                false => above = middle,
            }
        }
        Ok(fits)
    }

    /// Lets those in who wait, as long as there is room for all that they have to say so far.
    fn admit(&mut self, plan: &mut Plan) -> Result<()> {
        while plan.tokens.len() < self.limits.tokens {
            let Some(place) = self.next_waiting() else { return Ok(()) };
            // The place of a text that ends by the step underway is free when another may draw.
            let running = self.running.iter().filter(|branch| branch.awaited != Awaited::LastToken);
            let taken: usize = running.map(Branch::width).sum();
            if taken + self.waiting[place].width() > self.limits.sequences {
                return Ok(());
            }
            let branch = &self.waiting[place];
            let sequence = self.pool.open(&branch.tokens(0, branch.len()), b"")?;
            let found = self.pool.len(sequence)? as usize;
            let needed = self.pool.blocks_for(sequence, branch.len() - found)?;
            // And a token for each of those who write, lest the last be sent back at once.
            if needed + self.promised()? + self.running.len() > self.pool.available_blocks() {
                return self.pool.close(sequence);
            }
            let branch = self.waiting.swap_remove(place);
            let branch = Branch { rank: self.rank(&branch), ..branch };
            self.counts.found += found as u64;
            let place = self.running.partition_point(|other| Self::comes_first(other, &branch));
            self.running.insert(place, Branch { sequence: Some(sequence), ..branch });
            self.plan_reader(place, plan)?;
        }
        Ok(())
    }

    /// Blocks that those who run need to read what they have so far.
    fn promised(&self) -> Result<usize> {
        let needed = self.running.iter().map(|branch| {
            let (sequence, unread) = self.unread(branch)?;
            self.pool.blocks_for(sequence, unread)
        });
        needed.sum()
    }

    fn next_waiting(&self) -> Option<usize> {
        let order = |place: &usize| {
            let branch = &self.waiting[*place];
            (Reverse(self.rank(branch)), branch.key)
        };
        (0..self.waiting.len()).min_by_key(order)
    }

    /// The priority, with what waiting adds to it.
    fn rank(&self, branch: &Branch) -> i64 {
        match self.policy {
            Policy::Fcfs => 0,
            Policy::Priority { ageing: 0 } => branch.priority.into(),
            Policy::Priority { ageing } => {
                let waited = (self.steps - branch.since) / ageing;
                i64::from(branch.priority).saturating_add_unsigned(waited)
            }
        }
    }

    fn comes_first(one: &Branch, other: &Branch) -> bool {
        let order = |branch: &Branch| (Reverse(branch.rank), branch.key);
        order(one) < order(other)
    }

    /// Where a running text is, and how many of its tokens the model has not read and is to read. With a draft in the step, the
    /// pool has more than the text.
    fn unread(&self, branch: &Branch) -> Result<(SequenceId, usize)> {
        let sequence = sequence(branch)?;
        let unread = branch.len().saturating_sub(self.pool.len(sequence)? as usize);
        Ok((sequence, if branch.awaited == Awaited::LastToken { 0 } else { unread }))
    }

    /// Puts the next tokens of a running text into the step, and what is guessed to come after the last.
    fn take(&mut self, place: usize, count: usize, drafts: &[u32], plan: &mut Plan) -> Result<()> {
        let branch = &self.running[place];
        let (sequence, unread) = self.unread(branch)?;
        let tokens = [&branch.tokens(branch.len() - unread, count), drafts].concat();
        self.pool.append(sequence, &tokens)?;
        let of_prompt = branch.prompt.len().saturating_sub(branch.len() - unread).min(count);
        self.counts.read += of_prompt as u64;
        let rows = (plan.tokens.len() as i32..).zip(&tokens);
        let awaiting = rows.filter(|(_, token)| **token == AWAITED);
        plan.awaiting.extend(awaiting.map(|(row, _)| (row, branch.key)));
        if count == unread {
            plan.ends.push((plan.sequences.len(), drafts.to_vec()));
        }
        plan.sequences.push(sequence);
        plan.keys.push(branch.key);
        plan.tokens.extend(tokens);
        Ok(())
    }

    fn batch(&mut self, plan: Plan) -> Result<Batch> {
        let rows = rows_for(plan.tokens.len(), self.limits.target);
        let step = self.pool.step(&plan.sequences, rows)?;
        let last_rows = step.last_rows();
        let mut drawn = Vec::new();
        for (end, drafts) in plan.ends {
            let (key, row) = (plan.keys[end], last_rows[end] - drafts.len() as i32);
            drawn.push(Drawing { key, row, drafts });
            let siblings = self.fork(key)?.into_iter();
            drawn.extend(siblings.map(|key| Drawing { key, row, drafts: Vec::new() }));
        }
        let keys = plan.keys.iter().copied().chain(drawn.iter().map(|drawing| drawing.key));
        let mut keys = keys.collect::<Vec<_>>();
        keys.sort_unstable();
        keys.dedup();
        Ok(Batch { step, tokens: plan.tokens, awaiting: plan.awaiting, drawn, keys })
    }

    /// Begins the other texts of a request whose prompt is read.
    fn fork(&mut self, key: Key) -> Result<Vec<Key>> {
        let Some(place) = self.running.iter().position(|branch| branch.key == key) else {
            return Ok(Vec::new());
        };
        let count = std::mem::take(&mut self.running[place].siblings);
        let mut siblings = Vec::new();
        for choice in 1..=count {
            let leader = &self.running[place];
            let sibling = leader.sibling(choice, self.pool.fork(sequence(leader)?)?);
            siblings.push(sibling.key);
            let after = self.running.partition_point(|other| Self::comes_first(other, &sibling));
            self.running.insert(after, sibling);
        }
        Ok(siblings)
    }

    /// Not of texts whose token is awaited.
    fn preempt(&mut self, branch: Branch) -> Result<()> {
        debug_assert_eq!(branch.awaited, Awaited::Nothing);
        self.pool.close(sequence(&branch)?)?;
        self.counts.preempted += 1;
        self.waiting.push(Branch { sequence: None, ..branch });
        Ok(())
    }
}

/// The sequence of a text that runs.
fn sequence(branch: &Branch) -> Result<SequenceId> {
    CHECK.known(branch.sequence, "request", "be running", format_args!("{:?}", branch.key))
}

/// How many rows a step of so many tokens has. On a GPU powers of two, and from 64 on multiples of 64: as few as MLX's
/// graphs can be reused for.
pub(crate) fn rows_for(tokens: usize, target: Target) -> usize {
    match target {
        Target::Cpu => tokens,
        _ if tokens <= 64 => tokens.next_power_of_two(),
        _ => tokens.next_multiple_of(64),
    }
}
