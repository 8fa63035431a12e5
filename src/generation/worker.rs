//! The engine's thread: takes requests in, runs steps, hands tokens out.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

use mlx_rs::Array;

use super::{
    TARGET,
    client::Client,
    constrained::{Constraints, Verdict},
    model::{CausalModel, kvs},
    options::GenerationEngineOptions,
    panicked::message,
    request::FinishReason,
    runner::{Runner, Step},
    samplers::{Drawn, Text},
    scheduler::{Batch, Branch, Key, Limits, Scheduler},
    speculation::{Drafter, Drafting, Guesses},
    stats::{Shared, lock},
    text::Detokenizer,
};
use crate::{
    cache::{PagedKvOptions, PagedPoolOptions},
    check::Check,
    dispatch::Context,
    error::{Error, Result},
    sampling::NOTHING_TO_DRAW,
};

const CHECK: Check = Check::op("GenerationEngine");
const NOT_A_NUMBER: &str = "the model's output is not a number";
const NOTHING_ALLOWED: &str = "the model gives no chance to any token that the request allows";

/// What a handle tells the thread.
pub(super) enum Command {
    Submit(Box<Client>),
    Stop,
}

pub(super) struct Worker<M> {
    runner: Runner<M>,
    drafting: Option<Drafting>,
    kvs: Vec<PagedKvOptions>,
    scheduler: Scheduler,
    detokenizer: Option<Arc<dyn Detokenizer>>,
    shared: Arc<Mutex<Shared>>,
    clients: BTreeMap<u64, Client>,
    constraints: Constraints,
    /// Those whose last word is not handed over yet.
    leaving: Vec<Client>,
    /// The step that the device works on.
    underway: Option<Step>,
    /// Whether the next one is put together meanwhile.
    runs_ahead: bool,
    next: u64,
}

/// The next step, if there is one.
type Built = std::result::Result<Option<Step>, Failure>;

/// Why there is no step, and whose it was.
struct Failure {
    requests: Vec<u64>,
    reason: String,
}

impl Failure {
    fn of(batch: &Batch, reason: String) -> Self {
        Self { requests: batch.requests(), reason }
    }
}

/// What `run` returns. A model that panics fails its own requests, and no others.
fn caught<T>(batch: &Batch, run: impl FnOnce() -> Result<T>) -> std::result::Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(error)) => Err(Failure::of(batch, said(&error))),
        Err(panic) => Err(Failure::of(batch, format!("the model panicked: {}", message(&*panic)))),
    }
}

impl<M: CausalModel> Worker<M> {
    pub(super) fn new(
        model: M,
        drafter: Option<Box<dyn Drafter + Send>>,
        options: GenerationEngineOptions,
        pool: PagedPoolOptions,
        shared: Arc<Mutex<Shared>>,
    ) -> Result<Self> {
        let kvs = kvs(&model, pool.blocks, pool.block_size, options.forms());
        let target = Context::current()?.target;
        let runs_ahead = options.runs_ahead(target);
        let limits = Limits {
            sequences: options.texts_at_once(),
            tokens: options.max_batch_tokens,
            chunk: options.max_prompt_chunk,
            target,
        };
        Ok(Self {
            drafting: drafter.map(|drafter| {
                Drafting::new(drafter, options.max_draft_tokens, model.vocabulary())
            }),
            runner: Runner::new(model, &kvs, options.log_probabilities)?,
            kvs,
            scheduler: Scheduler::new(options.policy, limits, pool)?,
            detokenizer: options.detokenizer,
            shared,
            clients: BTreeMap::new(),
            constraints: Constraints::default(),
            leaving: Vec::new(),
            underway: None,
            runs_ahead,
            next: 0,
        })
    }

    /// Works until it is told to stop, or nobody is left who could tell it anything.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        while self.listen(commands) {
            self.drop_cancelled();
            let began = Instant::now();
            if self.work() {
                lock(&self.shared).stats.time += began.elapsed();
            }
            self.publish();
            self.flush();
        }
        self.rest();
        for request in self.requests() {
            self.end(request, &FinishReason::Cancelled);
        }
        self.publish();
        self.flush();
    }

    /// Waits for the step that is underway, which nobody waits for any longer.
    fn rest(&mut self) {
        if let Some(Step { batch, result, span }) = self.underway.take() {
            let finish = || self.runner.finish(result);
            drop(span.in_scope(|| caught(&batch, finish)));
        }
        self.runner.rest();
    }

    /// Goes from one step to the next. Whether there was anything to do.
    fn work(&mut self) -> bool {
        let next = self.next_step();
        let before = self.underway.take();
        if before.is_none() && matches!(next, Ok(None)) {
            return false;
        }
        match self.go_on(before, next) {
            Ok(next) => self.underway = next,
            Err(failure) => self.fail(failure),
        }
        true
    }

    /// Waits for the step that is underway, hands the next one over, before that if it can, and tells of what the one before
    /// has drawn. Where that fails, the next step is lost with the caches, and let go before there are new ones.
    fn go_on(&mut self, before: Option<Step>, next: Built) -> Built {
        let Some(Step { batch, result, span }) = before else { return self.hand_over(next?) };
        let at_once = matches!(&next, Ok(Some(next)) if self.runner.follows_at_once(&next.batch));
        let next = if at_once { next.and_then(|next| self.hand_over(next)) } else { next };
        let drawn = span.in_scope(|| caught(&batch, || self.runner.finish(result)))?;
        let next = if at_once { next } else { next.and_then(|next| self.hand_over(next)) };
        span.in_scope(|| self.tell(&batch, drawn))?;
        next
    }

    /// Takes what handles have said, and waits for them where there is nothing to do. Whether to go on.
    fn listen(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let command = if self.clients.is_empty() {
                self.rest();
                commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                commands.try_recv()
            };
            match command {
                Ok(Command::Submit(client)) => self.admit(*client),
                Ok(Command::Stop) => return false,
                Err(TryRecvError::Empty) => return true,
                // Those that stream need no handle.
                Err(TryRecvError::Disconnected) => return !self.clients.is_empty(),
            }
        }
    }

    fn admit(&mut self, client: Client) {
        let (request, key) = (&client.request, Key { request: self.next, choice: 0 });
        let siblings = request.texts() - 1;
        self.scheduler.push(Branch::new(
            key,
            request.prompt.clone().into(),
            request.priority,
            siblings,
        ));
        self.clients.insert(self.next, client);
        self.next += 1;
    }

    fn drop_cancelled(&mut self) {
        let gone = self.clients.iter().filter(|(_, client)| client.is_cancelled());
        for request in gone.map(|(request, _)| *request).collect::<Vec<_>>() {
            self.end(request, &FinishReason::Cancelled);
        }
    }

    /// Guesses of how the texts that are being written go on.
    fn guess(&mut self) -> Guesses {
        let Some(drafting) = &mut self.drafting else { return Guesses::default() };
        let texts = self.scheduler.writers().filter_map(|branch| {
            let client = self.clients.get(&branch.key.request)?;
            Some(text(client, branch))
        });
        drafting.guess(&texts.collect::<Vec<_>>(), |key| {
            self.clients.get(&key.request).map_or(0, |client| client.left(key.choice))
        })
    }

    /// The next step, if there is one and it can be known yet.
    fn next_step(&mut self) -> Built {
        let (batch, drawn_by) = match self.underway {
            None => {
                let Guesses { drafts, probabilities } = self.guess();
                (self.timed(|worker| worker.scheduler.schedule(&drafts)), probabilities)
            }
            Some(_) if self.can_run_ahead() => (self.timed(Self::schedule_ahead), BTreeMap::new()),
            Some(_) => return Ok(None),
        };
        match batch {
            Ok(Some(batch)) => self.build(batch, &drawn_by).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(Failure { requests: self.requests(), reason: said(&error) }),
        }
    }

    /// Whether what comes after a step depends on its tokens only by what they are.
    fn can_run_ahead(&self) -> bool {
        let constrained = |client: &Client| client.request.constraint.is_some();
        self.runs_ahead && self.drafting.is_none() && !self.clients.values().any(constrained)
    }

    fn schedule_ahead(&mut self) -> Result<Option<Batch>> {
        let Some(Step { batch, .. }) = &self.underway else { return Ok(None) };
        let clients = &self.clients;
        self.scheduler.schedule_ahead(batch, |key| {
            clients.get(&key.request).is_some_and(|client| client.left(key.choice) == 1)
        })
    }

    /// What `run` returns, whose time is the engine's own.
    fn timed<T>(&mut self, run: impl FnOnce(&mut Self) -> T) -> T {
        let began = Instant::now();
        let result = run(self);
        lock(&self.shared).stats.scheduling_time += began.elapsed();
        result
    }

    /// Puts a step together.
    fn build(
        &mut self,
        batch: Batch,
        drawn_by: &BTreeMap<Key, Array>,
    ) -> std::result::Result<Step, Failure> {
        lock(&self.shared).stats.steps += 1;
        let span = tracing::debug_span!(
            target: TARGET,
            "step",
            tokens = batch.tokens.len(),
            texts = batch.keys.len(),
            waiting = self.scheduler.waiting(),
        );
        let (clients, scheduler, before) = (&self.clients, &self.scheduler, self.underway.as_ref());
        let (runner, constraints) = (&mut self.runner, &mut self.constraints);
        let build = || {
            let texts = batch.drawn.iter().map(|drawing| {
                let (client, branch) =
                    (clients.get(&drawing.key.request)?, scheduler.get(drawing.key)?);
                let draft_probabilities = drawn_by.get(&drawing.key);
                Some(Text { drafts: &drawing.drafts, draft_probabilities, ..text(client, branch) })
            });
            let texts = texts.collect::<Option<Vec<_>>>();
            let texts = CHECK.known(texts, "batch", "hold texts that have not ended", "others")?;
            let alive = |key| scheduler.get(key).is_some();
            runner.build(&batch, &texts, constraints, alive, before)
        };
        let result = span.in_scope(|| caught(&batch, build))?;
        Ok(Step { batch, result, span })
    }

    fn hand_over(&self, step: Option<Step>) -> Built {
        if let Some(Step { batch, result, span }) = &step {
            span.in_scope(|| caught(batch, || self.runner.hand_over(result)))?;
        }
        Ok(step)
    }

    /// Tells of what a step has drawn.
    fn tell(&mut self, batch: &Batch, drawn: Vec<Vec<Drawn>>) -> std::result::Result<(), Failure> {
        let told = self.timed(|worker| worker.advance(batch, drawn));
        told.map_err(|error| Failure::of(batch, said(&error)))
    }

    fn advance(&mut self, batch: &Batch, drawn: Vec<Vec<Drawn>>) -> Result<()> {
        // Before the scheduler takes it in: what comes of no number is not to be found by others.
        for (drawing, drawn) in batch.drawn.iter().zip(&drawn) {
            if let Some(reason) = self.fault(drawing.key, drawn) {
                self.end(drawing.key.request, &FinishReason::Failed(reason.to_owned()));
            }
        }
        let tokens = drawn.iter().map(|drawn| drawn.iter().map(|drawn| drawn.token).collect());
        self.scheduler.advance(batch, &tokens.collect::<Vec<_>>())?;
        let mut counts = Counts::default();
        for (drawing, drawn) in batch.drawn.iter().zip(drawn) {
            // A text that ended meanwhile was drawn for in vain.
            if self.scheduler.get(drawing.key).is_none() {
                continue;
            }
            let (drafted, kept) = (drawing.drafts.len() as u64, drawn.len() as u64 - 1);
            let told = self.hand_out(drawing.key, drawn);
            counts.drafted += drafted;
            counts.accepted += kept.min(told);
            counts.generated += told;
        }
        let mut shared = lock(&self.shared);
        shared.stats.generated_tokens += counts.generated;
        shared.stats.drafted_tokens += counts.drafted;
        shared.stats.accepted_tokens += counts.accepted;
        Ok(())
    }

    /// What is wrong with what was drawn for a text, if it has not ended.
    fn fault(&self, key: Key, drawn: &[Drawn]) -> Option<&'static str> {
        let (branch, client) = (self.scheduler.get(key)?, self.clients.get(&key.request)?);
        let sampling = &client.request.sampling;
        let nothing = |(place, drawn): (usize, &Drawn)| {
            drawn.token == NOTHING_TO_DRAW && !sampling.may_draw(drawn.token, place)
        };
        if drawn.iter().any(|drawn| drawn.log_probability.is_nan()) {
            Some(NOT_A_NUMBER)
        } else if (branch.output.len()..).zip(drawn).any(nothing) {
            Some(NOTHING_ALLOWED)
        } else {
            None
        }
    }

    /// Tells of the tokens of a text, as far as it goes; returns how many those were.
    fn hand_out(&mut self, key: Key, drawn: Vec<Drawn>) -> u64 {
        let mut told = 0;
        for drawn in drawn {
            let goes_on = self.hand(key, drawn);
            told += u64::from(goes_on.is_some());
            if goes_on != Some(true) {
                break;
            }
        }
        told
    }

    /// Tells of a token, and returns whether the text goes on; `None` where it ended before.
    fn hand(&mut self, key: Key, drawn: Drawn) -> Option<bool> {
        let client = self.clients.get_mut(&key.request)?;
        let stops = &client.request.sampling.stop_tokens;
        let completes = match self.constraints.accept(key, drawn.token, stops) {
            Verdict::GoesOn => false,
            Verdict::Completed => true,
            Verdict::WasComplete => {
                self.leave_for(key, FinishReason::Complete);
                return None;
            }
            Verdict::Failed(reason) => {
                self.leave_for(key, FinishReason::Failed(reason));
                return None;
            }
        };
        let words = self.detokenizer.as_deref();
        match catch_unwind(AssertUnwindSafe(|| client.draw(key.choice, drawn, completes, words))) {
            Ok(false) => Some(true),
            Ok(true) => {
                self.leave(key);
                Some(false)
            }
            Err(panic) => {
                let reason = format!("the detokenizer panicked: {}", message(&*panic));
                self.end(key.request, &FinishReason::Failed(reason));
                None
            }
        }
    }

    /// Ends a text with what it has.
    fn leave_for(&mut self, key: Key, reason: FinishReason) {
        if let Some(client) = self.clients.get_mut(&key.request) {
            client.finish(key.choice, reason);
        }
        self.leave(key);
    }

    /// Lets go of a text that has ended, and of its request with the last one.
    fn leave(&mut self, key: Key) {
        self.remove(key);
        if self.clients.get(&key.request).is_some_and(Client::is_done) {
            self.forget(key.request);
        }
    }

    /// Ends all texts of a request.
    fn end(&mut self, request: u64, reason: &FinishReason) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        let choices = client.choices();
        choices.iter().for_each(|choice| client.finish(*choice, reason.clone()));
        choices.into_iter().for_each(|choice| self.remove(Key { request, choice }));
        self.forget(request);
    }

    fn remove(&mut self, key: Key) {
        self.constraints.remove(key);
        if let Some(drafting) = &mut self.drafting {
            drafting.end(key);
        }
        if let Err(error) = self.scheduler.remove(key) {
            tracing::error!(target: TARGET, %error, "a text could not be removed");
        }
    }

    fn forget(&mut self, request: u64) {
        if let Some(client) = self.clients.remove(&request) {
            let mut shared = lock(&self.shared);
            shared.ids.remove(&client.id);
            shared.stats.finished += 1;
            drop(shared);
            self.leaving.push(client);
        }
    }

    fn flush(&mut self) {
        self.clients.values_mut().for_each(Client::flush);
        self.leaving.drain(..).for_each(|mut client| client.flush());
    }

    /// Ends these requests. What the caches hold is lost, and everybody else is read again.
    fn fail(&mut self, Failure { requests, reason }: Failure) {
        tracing::warn!(target: TARGET, reason, "a step failed");
        self.end_all(requests, &reason);
        let anew = self.scheduler.reset().and_then(|()| self.runner.reset(&self.kvs));
        if let Err(error) = anew {
            self.end_all(self.requests(), &said(&error));
        }
    }

    fn end_all(&mut self, requests: Vec<u64>, reason: &str) {
        for request in requests {
            self.end(request, &FinishReason::Failed(reason.to_owned()));
        }
    }

    fn requests(&self) -> Vec<u64> {
        self.clients.keys().copied().collect()
    }

    fn publish(&self) {
        let mut shared = lock(&self.shared);
        let (pool, counts) = (self.scheduler.pool(), self.scheduler.counts);
        let stats = &mut shared.stats;
        stats.waiting = self.scheduler.waiting();
        stats.running = self.scheduler.running();
        stats.used_blocks = pool.used_blocks();
        stats.available_blocks = pool.available_blocks();
        stats.prompt_tokens = counts.read;
        stats.shared_tokens = counts.found;
        stats.preemptions = counts.preempted;
    }
}

/// What the texts of one step got.
#[derive(Default)]
struct Counts {
    generated: u64,
    drafted: u64,
    accepted: u64,
}

/// A text as it stands, without a draft.
fn text<'a>(client: &'a Client, branch: &'a Branch) -> Text<'a> {
    Text {
        key: branch.key,
        request: &client.request,
        prompt: &branch.prompt,
        output: &branch.output,
        drafts: &[],
        draft_probabilities: None,
    }
}

/// What an error says, without where in the engine it was met.
fn said(error: &Error) -> String {
    match error {
        Error::Mlx(exception) => exception.what().to_owned(),
        error => error.to_string(),
    }
}
