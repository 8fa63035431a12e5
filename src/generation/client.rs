//! A request that is being served, as the engine's thread sees it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
};

use super::{
    request::{Finish, FinishReason, GeneratedToken, GenerationEvent, GenerationRequest},
    samplers::Drawn,
    text::{Detokenizer, StopFinder, TextStream},
};

/// Who gets the answers, and how each text stands.
pub(super) struct Client {
    pub(super) id: String,
    pub(super) request: GenerationRequest,
    events: Sender<GenerationEvent>,
    /// What is told once the engine's books are closed.
    told: Vec<GenerationEvent>,
    cancelled: Arc<AtomicBool>,
    texts: BTreeMap<u32, Text>,
}

#[derive(Clone)]
struct Text {
    tokens: usize,
    characters: TextStream,
    stops: StopFinder,
}

impl Client {
    pub(super) fn new(
        id: String,
        request: GenerationRequest,
        events: Sender<GenerationEvent>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        let text = Text {
            tokens: 0,
            characters: TextStream::default(),
            stops: StopFinder::new(request.stop_strings.clone(), request.include_stop_string),
        };
        let texts = (0..request.texts()).map(|choice| (choice, text.clone())).collect();
        Self { id, request, events, told: Vec::new(), cancelled, texts }
    }

    /// Whether nobody waits for more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Whether every text has ended.
    pub(super) fn is_done(&self) -> bool {
        self.texts.is_empty()
    }

    /// How many more tokens a text may get.
    pub(super) fn left(&self, choice: u32) -> usize {
        let got = self.texts.get(&choice).map_or(self.request.max_tokens, |text| text.tokens);
        self.request.max_tokens.saturating_sub(got)
    }

    /// The texts that have not ended.
    pub(super) fn choices(&self) -> Vec<u32> {
        self.texts.keys().copied().collect()
    }

    /// Tells of a token, which may complete what its constraint allows, and returns whether the text has ended with it.
    pub(super) fn record(
        &mut self,
        choice: u32,
        drawn: Drawn,
        completes: bool,
        detokenizer: Option<&dyn Detokenizer>,
    ) -> bool {
        let Some(text) = self.texts.get_mut(&choice) else { return true };
        let Drawn { token, log_probability, mut top } = drawn;
        if self.request.sampling.stop_tokens.contains(&token) {
            self.finish(choice, FinishReason::StopToken(token));
            return true;
        }
        text.tokens += 1;
        let piece = detokenizer.map(|words| text.characters.push(&words.bytes(token)));
        let shown = text.stops.push(&piece.unwrap_or_default());
        let full = text.tokens >= self.request.max_tokens;
        top.truncate(self.request.top_log_probabilities.unsigned_abs() as usize);
        let token = GeneratedToken { choice, token, log_probability, top, text: shown.text };
        self.told.push(GenerationEvent::Token(token));
        let reason = match shown.stop {
            Some(stop) => FinishReason::StopString(stop),
            None if completes => FinishReason::Complete,
            None if full => FinishReason::Length,
            None => return false,
        };
        self.finish(choice, reason);
        true
    }

    /// Tells of the end of a text.
    pub(super) fn finish(&mut self, choice: u32, reason: FinishReason) {
        let Some(mut text) = self.texts.remove(&choice) else { return };
        let rest = match reason {
            FinishReason::StopString(_) => String::new(),
            _ => {
                let last = text.stops.push(&text.characters.finish()).text;
                last + &text.stops.finish()
            }
        };
        self.told.push(GenerationEvent::Finish(Finish { choice, reason, text: rest }));
    }

    /// Hands over what was told.
    pub(super) fn flush(&mut self) {
        for event in self.told.drain(..) {
            if self.events.send(event).is_err() {
                self.cancelled.store(true, Ordering::Relaxed);
            }
        }
    }
}
