//! The engine's thread: takes requests in, runs steps, hands tokens out.

mod deliver;

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
    constrained::Constraints,
    model::{CausalModel, kvs},
    options::GenerationEngineOptions,
    panicked::message,
    request::FinishReason,
    runner::{Runner, Step},
    samplers::Text,
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
};

const CHECK: Check = Check::op("GenerationEngine");

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
            // After the figures of the step: whoever has its last token may ask for them.
            let began = Instant::now();
            self.flush();
            let stats = &mut lock(&self.shared).stats;
            stats.time += began.elapsed();
            stats.scheduling_time += began.elapsed();
        }
        self.settle();
        for request in self.requests() {
            self.end_request(request, &FinishReason::Cancelled);
        }
        self.publish();
        self.flush();
    }

    /// Waits for the step that is underway, which nobody waits for any longer.
    fn settle(&mut self) {
        if let Some(Step { batch, result, span }) = self.underway.take() {
            let finish = || self.runner.finish(result);
            drop(span.in_scope(|| caught(&batch, finish)));
        }
        self.runner.forget_draws();
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

    /// Waits for the step that is underway, submits the next one, before that if it can, and delivers what the one before has
    /// drawn. Where that fails, the next step is lost with the caches, and dropped before there are new ones.
    fn go_on(&mut self, before: Option<Step>, next: Built) -> Built {
        let Some(Step { batch, result, span }) = before else { return self.submit(next?) };
        let at_once = matches!(&next, Ok(Some(next)) if self.runner.follows_at_once(&next.batch));
        let next = if at_once { next.and_then(|next| self.submit(next)) } else { next };
        let drawn = span.in_scope(|| caught(&batch, || self.runner.finish(result)))?;
        let next = if at_once { next } else { next.and_then(|next| self.submit(next)) };
        span.in_scope(|| self.deliver(&batch, drawn))?;
        next
    }

    /// Takes what handles have said, and waits for them where there is nothing to do. Whether to go on.
    fn listen(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let command = if self.clients.is_empty() {
                self.settle();
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
            self.end_request(request, &FinishReason::Cancelled);
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

    /// Hands a step to the device.
    fn submit(&self, step: Option<Step>) -> Built {
        if let Some(Step { batch, result, span }) = &step {
            span.in_scope(|| caught(batch, || self.runner.submit(result)))?;
        }
        Ok(step)
    }

    /// Ends these requests. What the caches hold is lost, and everybody else is read again.
    fn fail(&mut self, Failure { requests, reason }: Failure) {
        tracing::warn!(target: TARGET, reason, "a step failed");
        self.fail_requests(requests, &reason);
        let anew = self.scheduler.reset().and_then(|()| self.runner.reset(&self.kvs));
        if let Err(error) = anew {
            self.fail_requests(self.requests(), &said(&error));
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
