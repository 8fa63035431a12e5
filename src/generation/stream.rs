//! What a request gets, as it comes.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
};

use super::request::{Completion, Finish, FinishReason, GenerationEvent};

/// The events of a request, in the order in which they happen: an iterator that waits for the next, and ends when all
/// texts have. To drop it cancels the request.
#[derive(Debug)]
pub struct GenerationStream {
    id: String,
    events: Receiver<GenerationEvent>,
    cancelled: Arc<AtomicBool>,
    texts: u32,
    /// The texts that have not ended.
    open: BTreeSet<u32>,
}

impl GenerationStream {
    pub(super) fn new(
        id: String,
        texts: u32,
        events: Receiver<GenerationEvent>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        Self { id, events, cancelled, texts, open: (0..texts).collect() }
    }

    /// The name of the request.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Has the engine stop; the texts end as [`FinishReason::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for all texts.
    pub fn completions(self) -> Vec<Completion> {
        let mut completions = vec![Completion::new(); self.texts as usize];
        for event in self {
            if let Some(completion) = completions.get_mut(event.choice() as usize) {
                completion.take(event);
            }
        }
        completions
    }
}

impl Iterator for GenerationStream {
    type Item = GenerationEvent;

    fn next(&mut self) -> Option<GenerationEvent> {
        let first = *self.open.first()?;
        let stopped = || Finish {
            choice: first,
            reason: FinishReason::Failed("the engine has stopped".to_owned()),
            text: String::new(),
        };
        let event = self.events.recv().unwrap_or_else(|_| GenerationEvent::Finish(stopped()));
        if let GenerationEvent::Finish(finish) = &event {
            self.open.remove(&finish.choice);
        }
        Some(event)
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        self.cancel();
    }
}
