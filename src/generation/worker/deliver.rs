//! What a step has drawn, out to the streams: tokens into texts, and texts to their end.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Failure, Worker, said};
use crate::{
    error::Result,
    generation::{
        TARGET,
        client::Client,
        constrained::Verdict,
        model::CausalModel,
        panicked::message,
        request::FinishReason,
        samplers::Drawn,
        scheduler::{Batch, Key},
        stats::lock,
    },
    sampling::NOTHING_TO_DRAW,
};

const NOT_A_NUMBER: &str = "the model's output is not a number";
const NOTHING_ALLOWED: &str = "the model gives no chance to any token that the request allows";

/// What the texts of one step got.
#[derive(Default)]
struct Delivered {
    generated: u64,
    drafted: u64,
    accepted: u64,
}

impl<M: CausalModel> Worker<M> {
    /// Takes in what a step has drawn, and ends the texts that end with it.
    pub(super) fn deliver(
        &mut self,
        batch: &Batch,
        drawn: Vec<Vec<Drawn>>,
    ) -> std::result::Result<(), Failure> {
        let told = self.timed(|worker| worker.take_in(batch, drawn));
        told.map_err(|error| Failure::of(batch, said(&error)))
    }

    fn take_in(&mut self, batch: &Batch, drawn: Vec<Vec<Drawn>>) -> Result<()> {
        // Before the scheduler takes it in: what comes of no number is not to be found by others.
        for (drawing, drawn) in batch.drawn.iter().zip(&drawn) {
            if let Some(reason) = self.fault(drawing.key, drawn) {
                self.end_request(drawing.key.request, &FinishReason::Failed(reason.to_owned()));
            }
        }
        let tokens = drawn.iter().map(|drawn| drawn.iter().map(|drawn| drawn.token).collect());
        self.scheduler.advance(batch, &tokens.collect::<Vec<_>>())?;
        let mut counts = Delivered::default();
        for (drawing, drawn) in batch.drawn.iter().zip(drawn) {
            // A text that ended meanwhile was drawn for in vain.
            if self.scheduler.get(drawing.key).is_none() {
                continue;
            }
            let (drafted, kept) = (drawing.drafts.len() as u64, drawn.len() as u64 - 1);
            let told = self.deliver_tokens(drawing.key, drawn);
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

    /// Delivers the tokens of a text up to its end, and returns how many those were.
    fn deliver_tokens(&mut self, key: Key, drawn: Vec<Drawn>) -> u64 {
        let mut told = 0;
        for drawn in drawn {
            let goes_on = self.deliver_token(key, drawn);
            told += u64::from(goes_on.is_some());
            if goes_on != Some(true) {
                break;
            }
        }
        told
    }

    /// Delivers a token, and returns whether the text goes on; `None` where it ended before.
    fn deliver_token(&mut self, key: Key, drawn: Drawn) -> Option<bool> {
        let client = self.clients.get_mut(&key.request)?;
        let stops = &client.request.sampling.stop_tokens;
        let completes = match self.constraints.accept(key, drawn.token, stops) {
            Verdict::GoesOn => false,
            Verdict::Completed => true,
            Verdict::WasComplete => {
                self.finish_text(key, FinishReason::Complete);
                return None;
            }
            Verdict::Failed(reason) => {
                self.finish_text(key, FinishReason::Failed(reason));
                return None;
            }
        };
        let words = self.detokenizer.as_deref();
        match catch_unwind(AssertUnwindSafe(|| client.record(key.choice, drawn, completes, words)))
        {
            Ok(false) => Some(true),
            Ok(true) => {
                self.release_text(key);
                Some(false)
            }
            Err(panic) => {
                let reason = format!("the detokenizer panicked: {}", message(&*panic));
                self.end_request(key.request, &FinishReason::Failed(reason));
                None
            }
        }
    }

    /// Ends a text with what it has.
    fn finish_text(&mut self, key: Key, reason: FinishReason) {
        if let Some(client) = self.clients.get_mut(&key.request) {
            client.finish(key.choice, reason);
        }
        self.release_text(key);
    }

    /// Lets go of a text that has ended, and of its request with the last one.
    fn release_text(&mut self, key: Key) {
        self.remove_text(key);
        if self.clients.get(&key.request).is_some_and(Client::is_done) {
            self.release_request(key.request);
        }
    }

    /// Ends all texts of a request.
    pub(super) fn end_request(&mut self, request: u64, reason: &FinishReason) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        let choices = client.choices();
        choices.iter().for_each(|choice| client.finish(*choice, reason.clone()));
        choices.into_iter().for_each(|choice| self.remove_text(Key { request, choice }));
        self.release_request(request);
    }

    fn remove_text(&mut self, key: Key) {
        self.constraints.remove(key);
        if let Some(drafting) = &mut self.drafting {
            drafting.end(key);
        }
        if let Err(error) = self.scheduler.remove(key) {
            tracing::error!(target: TARGET, %error, "a text could not be removed");
        }
    }

    fn release_request(&mut self, request: u64) {
        if let Some(client) = self.clients.remove(&request) {
            let mut shared = lock(&self.shared);
            shared.ids.remove(&client.id);
            shared.stats.finished += 1;
            drop(shared);
            self.leaving.push(client);
        }
    }

    /// Sends what was recorded to the streams.
    pub(super) fn flush(&mut self) {
        self.clients.values_mut().for_each(Client::flush);
        self.leaving.drain(..).for_each(|mut client| client.flush());
    }

    /// Ends these requests with a reason.
    pub(super) fn fail_requests(&mut self, requests: Vec<u64>, reason: &str) {
        for request in requests {
            self.end_request(request, &FinishReason::Failed(reason.to_owned()));
        }
    }
}
