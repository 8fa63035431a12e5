//! The engine's thread: takes requests in, runs steps, hands tokens out.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, TryRecvError},
    },
    time::{Duration, Instant},
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
    runner::Runner,
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
};

const CHECK: Check = Check::op("GenerationEngine");
const NOT_A_NUMBER: &str = "the model's output is not a number";

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
    next: u64,
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
        let limits = Limits {
            sequences: options.max_batch_size,
            tokens: options.max_batch_tokens,
            chunk: options.max_prompt_chunk,
            target: Context::current()?.target,
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
            next: 0,
        })
    }

    /// Works until it is told to stop, or nobody is left who could tell it anything.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        while self.listen(commands) {
            self.drop_cancelled();
            let started = Instant::now();
            let guessed = self.guess();
            let guessing = started.elapsed();
            match self.scheduler.schedule(&guessed.drafts) {
                Ok(Some(batch)) => self.step(&batch, &guessed.probabilities, started, guessing),
                Ok(None) => {}
                Err(error) => self.fail(self.requests(), &said(&error)),
            }
            self.publish();
            self.flush();
        }
        for request in self.requests() {
            self.end(request, &FinishReason::Cancelled);
        }
        self.publish();
        self.flush();
    }

    /// Takes what handles have said, and waits for them where there is nothing to do. Whether to go on.
    fn listen(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            let command = if self.clients.is_empty() {
                self.runner.rest();
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

    /// Runs a step that was begun by so much guessing.
    fn step(
        &mut self,
        batch: &Batch,
        drawn_by: &BTreeMap<Key, Array>,
        started: Instant,
        guessing: Duration,
    ) {
        let span = tracing::debug_span!(
            target: TARGET,
            "step",
            tokens = batch.tokens.len(),
            texts = batch.keys.len(),
            waiting = self.scheduler.waiting(),
        );
        let _entered = span.enter();
        let scheduled = started.elapsed() - guessing;
        let (clients, scheduler) = (&self.clients, &self.scheduler);
        let texts = batch.drawn.iter().map(|drawing| {
            let (client, branch) =
                (clients.get(&drawing.key.request)?, scheduler.get(drawing.key)?);
            let draft_probabilities = drawn_by.get(&drawing.key);
            Some(Text { drafts: &drawing.drafts, draft_probabilities, ..text(client, branch) })
        });
        let (runner, constraints) = (&mut self.runner, &mut self.constraints);
        let drawn = match texts.collect::<Option<Vec<_>>>() {
            // A model that panics fails its own requests, and no others.
            Some(texts) => catch_unwind(AssertUnwindSafe(|| {
                runner.run(batch, &texts, constraints, |key| scheduler.get(key).is_some())
            })),
            None => Ok(CHECK.known(None, "batch", "hold texts that have not ended", "others")),
        };
        let read = Instant::now();
        match drawn {
            Ok(Ok(drawn)) => self.advance(batch, drawn),
            Ok(Err(error)) => self.fail(batch.requests(), &said(&error)),
            Err(panic) => {
                self.fail(batch.requests(), &format!("the model panicked: {}", message(&*panic)))
            }
        }
        let mut shared = lock(&self.shared);
        shared.stats.steps += 1;
        shared.stats.time += started.elapsed();
        shared.stats.scheduling_time += scheduled + read.elapsed();
        drop(shared);
    }

    fn advance(&mut self, batch: &Batch, drawn: Vec<Vec<Drawn>>) {
        // What comes of a text that is not a number is not to be found by others.
        for (drawing, drawn) in batch.drawn.iter().zip(&drawn) {
            if drawn.iter().any(|drawn| drawn.log_probability.is_nan()) {
                self.end(drawing.key.request, &FinishReason::Failed(NOT_A_NUMBER.to_owned()));
            }
        }
        let tokens = drawn.iter().map(|drawn| drawn.iter().map(|drawn| drawn.token).collect());
        let tokens = tokens.collect::<Vec<_>>();
        if let Err(error) = self.scheduler.advance(batch, &tokens) {
            return self.fail(batch.requests(), &said(&error));
        }
        let mut counts = Counts::default();
        for (drawing, drawn) in batch.drawn.iter().zip(drawn) {
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
    fn fail(&mut self, requests: Vec<u64>, reason: &str) {
        tracing::warn!(target: TARGET, reason, "a step failed");
        self.end_all(requests, reason);
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
