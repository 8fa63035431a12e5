//! What an engine asks of its drafter, whatever that does.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use mlx_rs::{Array, Dtype};

use super::{Draft, DraftedText, Drafter, TextId};
use crate::{
    check::{Check, axes},
    error::Result,
    generation::{
        TARGET,
        samplers::Text,
        scheduler::{Drafts, Key},
    },
};

const CHECK: Check = Check::op("Drafter");

/// What is guessed of the texts of one step.
#[derive(Debug, Default)]
pub(in crate::generation) struct Guesses {
    pub(in crate::generation) drafts: Drafts,
    /// Of drafts that were drawn, by what.
    pub(in crate::generation) probabilities: BTreeMap<Key, Array>,
}

/// A drafter, and how much of it is wanted.
pub(in crate::generation) struct Drafting {
    drafter: Box<dyn Drafter + Send>,
    limit: usize,
    vocabulary: u32,
}

impl Drafting {
    pub(in crate::generation) fn new(
        drafter: Box<dyn Drafter + Send>,
        limit: usize,
        vocabulary: i32,
    ) -> Self {
        Self { drafter, limit, vocabulary: vocabulary.unsigned_abs() }
    }

    /// Guesses of how these texts go on; `left` says how many tokens each may still get.
    pub(in crate::generation) fn guess(
        &mut self,
        texts: &[Text],
        left: impl Fn(Key) -> usize,
    ) -> Guesses {
        // After the last token that a text may get, none is drawn.
        let limit = |text: &Text| self.limit.min(left(text.key).saturating_sub(1));
        let texts = texts.iter().filter(|text| text.request.sampling.mirostat.is_none());
        let texts = texts.map(|text| text.drafted(limit(text))).filter(|text| text.limit > 0);
        let texts = texts.collect::<Vec<_>>();
        if texts.is_empty() {
            return Guesses::default();
        }
        let drafter = &mut self.drafter;
        let drafts = match catch_unwind(AssertUnwindSafe(|| drafter.draft(&texts))) {
            Ok(Ok(drafts)) => drafts,
            Ok(Err(error)) => {
                tracing::warn!(target: TARGET, %error, "the drafter failed");
                Vec::new()
            }
            Err(_) => {
                tracing::warn!(target: TARGET, "the drafter panicked");
                Vec::new()
            }
        };
        let mut guesses = Guesses::default();
        for (text, draft) in texts.iter().zip(drafts) {
            self.take(text, draft, &mut guesses);
        }
        guesses
    }

    fn take(&self, text: &DraftedText, draft: Draft, guesses: &mut Guesses) {
        let Draft { mut tokens, probabilities } = draft;
        let known = |token: &&u32| **token < self.vocabulary;
        tokens.truncate(tokens.iter().take(text.limit).take_while(known).count());
        let stops = &text.sampling.stop_tokens;
        if let Some(stop) = tokens.iter().position(|token| stops.contains(token)) {
            // Nothing comes after it. A guess needs no check, for the model draws it as it is; but what was drawn must be checked
            // whatever it is, or it would come as often as both draw it.
            tokens.truncate(stop + usize::from(probabilities.is_some()));
        }
        if let Err(error) = self.check(tokens.len(), probabilities.as_ref()) {
            return tracing::warn!(target: TARGET, %error, "the drafter failed");
        }
        let TextId(key) = text.id;
        guesses.probabilities.extend(probabilities.map(|probabilities| (key, probabilities)));
        guesses.drafts.insert(key, tokens);
    }

    /// There is a row of probabilities for each token, where there are any.
    fn check(&self, tokens: usize, probabilities: Option<&Array>) -> Result<()> {
        let Some(probabilities) = probabilities else { return Ok(()) };
        let rows = probabilities.shape().first().copied().unwrap_or_default().max(tokens as i32);
        let vocabulary = self.vocabulary.cast_signed();
        CHECK.dtype_among("probabilities", probabilities, &[Dtype::Float32])?;
        CHECK.shape("probabilities", probabilities, axes![rows, vocabulary])
    }

    pub(in crate::generation) fn end(&mut self, key: Key) {
        let drafter = &mut self.drafter;
        if catch_unwind(AssertUnwindSafe(|| drafter.end(TextId(key)))).is_err() {
            tracing::warn!(target: TARGET, "the drafter panicked");
        }
    }
}
