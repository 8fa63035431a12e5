//! What is asked of an engine, and what it answers.

use std::sync::Arc;

use super::constraint::Constraint;
use crate::{check::Check, error::Result, sampling::SamplingParams};

const CHECK: Check = Check::op("GenerationRequest");
/// Each is a pass over the logits of the whole batch.
const MAX_TOP: i32 = 20;

/// A prompt, and how it is to go on. Start from [`GenerationRequest::new`]: the default has no prompt, and is refused.
#[derive(Debug, Clone, Default)]
pub struct GenerationRequest {
    /// Names the request; no two of an engine at once may have the same. Default: the engine finds one.
    pub id: Option<String>,
    /// One token or more.
    pub prompt: Vec<u32>,
    /// How many tokens each text gets at most: 1 or more.
    pub max_tokens: usize,
    /// How tokens are drawn. The stop tokens in it end a text, and are no part of it. Text `n` draws by `seed + n`.
    pub sampling: SamplingParams,
    /// Strings that end a text, also where several tokens make one up. They need an engine with a
    /// [`Detokenizer`](super::Detokenizer).
    pub stop_strings: Vec<String>,
    /// Whether a stop string is part of the text. Default: no.
    pub include_stop_string: bool,
    /// How many texts begin with the prompt, which is read once; 0 counts as 1.
    pub n: u32,
    /// The highest goes first, and has to wait last where room runs short, if the engine's policy is
    /// [`Policy::Priority`](super::Policy::Priority).
    pub priority: i32,
    /// How many of the most likely tokens to report beside each one drawn, up to 20 and the vocabulary. Default: 0.
    pub top_log_probabilities: i32,
    /// What each text must match; tokens are drawn among those that it allows. Default: none.
    pub constraint: Option<Arc<dyn Constraint>>,
}

impl GenerationRequest {
    /// At most this many tokens after this prompt, drawn from the model's own distribution.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self { prompt, max_tokens, n: 1, ..Self::default() }
    }

    /// How many texts there will be.
    pub(super) fn texts(&self) -> u32 {
        self.n.max(1)
    }

    /// With the stop tokens that its constraint has of its own.
    pub(super) fn with_all_stops(mut self) -> Self {
        if let Some(constraint) = &self.constraint {
            let known = &mut self.sampling.stop_tokens;
            let new = constraint.stop_tokens().iter().filter(|token| !known.contains(token));
            let new = new.copied().collect::<Vec<_>>();
            known.extend(new);
        }
        self
    }

    /// Refuses what no engine with this vocabulary could do.
    pub(super) fn check(&self, vocabulary: i32, detokenizes: bool) -> Result<()> {
        let first = self.prompt.first();
        CHECK.known(first, "prompt", "have a token", "none")?;
        let unknown = self.prompt.iter().find(|&&id| i64::from(id) >= i64::from(vocabulary));
        let expected = format_args!("hold ids below {vocabulary}");
        unknown.map_or(Ok(()), |id| CHECK.value(false, "prompt", expected, id))?;
        CHECK.value(self.max_tokens > 0, "max_tokens", "be at least 1", self.max_tokens)?;
        // Before its stop tokens are, which are those of its vocabulary.
        if let Some(constraint) = &self.constraint {
            let (fits, expected) =
                (constraint.vocabulary() == vocabulary, format_args!("be of {vocabulary} tokens"));
            CHECK.value(fits, "constraint", expected, constraint.vocabulary())?;
        }
        self.sampling.check(vocabulary)?;
        let empty = self.stop_strings.iter().any(String::is_empty);
        CHECK.value(!empty, "stop_strings", "be of one character or more", "\"\"")?;
        let found = detokenizes || self.stop_strings.is_empty();
        CHECK.value(found, "stop_strings", "be none without a detokenizer", "some")?;
        let (top, most) = (self.top_log_probabilities, MAX_TOP.min(vocabulary));
        let expected = format_args!("be from 0 to {most}");
        CHECK.value((0..=most).contains(&top), "top_log_probabilities", expected, top)
    }
}

/// Why a text ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// This stop token was drawn.
    StopToken(u32),
    /// This string was found.
    StopString(String),
    /// Its constraint lets nothing follow. Where [`Constraint::is_complete`](super::Constraint::is_complete) says so at once,
    /// this is told with the token that completes it, whatever [`min_tokens`](SamplingParams::min_tokens) and `max_tokens` say.
    Complete,
    /// It has as many tokens as it may have.
    Length,
    /// The stream was dropped, the request cancelled, or the engine shut down.
    Cancelled,
    /// The model or the text's constraint failed with this message.
    Failed(String),
}

/// A token that was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Which of the request's texts it belongs to.
    pub choice: u32,
    /// Its id.
    pub token: u32,
    /// Its log-probability.
    pub log_probability: f32,
    /// The most likely tokens and their log-probabilities, as many as were asked for.
    pub top: Vec<(u32, f32)>,
    /// The text that it completes: empty where a character or a stop string may still come of it, and where the engine has
    /// no detokenizer.
    pub text: String,
}

/// The end of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Which of the request's texts.
    pub choice: u32,
    /// Why.
    pub reason: FinishReason,
    /// What was held back in vain.
    pub text: String,
}

/// What an engine answers, in the order in which it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// A text goes on.
    Token(GeneratedToken),
    /// A text has ended.
    Finish(Finish),
}

/// A whole text.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The log-probability of each.
    pub log_probabilities: Vec<f32>,
    /// All of its text, where the engine has a detokenizer.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
}

impl Completion {
    pub(super) fn new() -> Self {
        let (tokens, log_probabilities, text) = (Vec::new(), Vec::new(), String::new());
        Self { tokens, log_probabilities, text, reason: FinishReason::Cancelled }
    }

    pub(super) fn take(&mut self, event: GenerationEvent) {
        match event {
            GenerationEvent::Token(token) => {
                self.tokens.push(token.token);
                self.log_probabilities.push(token.log_probability);
                self.text.push_str(&token.text);
            }
            GenerationEvent::Finish(finish) => {
                self.text.push_str(&finish.text);
                self.reason = finish.reason;
            }
        }
    }
}

impl GenerationEvent {
    pub(super) fn choice(&self) -> u32 {
        match self {
            Self::Token(token) => token.choice,
            Self::Finish(finish) => finish.choice,
        }
    }
}
