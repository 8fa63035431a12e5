//! Speculative decoding: cheap drafts of the next tokens, which the model checks in one step.

mod draft_model;
mod drafting;
mod prompt_lookup;

use mlx_rs::Array;

pub use draft_model::{DraftModel, DraftModelOptions};
pub(super) use drafting::{Drafting, Guesses};
pub use prompt_lookup::PromptLookup;

use super::scheduler::Key;
use crate::{error::Result, sampling::SamplingParams};

/// Which text of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TextId(pub(super) Key);

/// A text that is being written, for a [`Drafter`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct DraftedText<'a> {
    /// The same from call to call.
    pub id: TextId,
    /// What it began with.
    pub prompt: &'a [u32],
    /// What was written since.
    pub output: &'a [u32],
    /// How it draws, but for the seed.
    pub sampling: &'a SamplingParams,
    /// The seed by which it draws.
    pub seed: u64,
    /// How many tokens of a draft would be read at most.
    pub limit: usize,
}

impl DraftedText<'_> {
    /// How many tokens it has.
    pub(super) fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    /// Its tokens from number `from` on.
    pub(super) fn tokens(&self, from: usize) -> impl Iterator<Item = u32> {
        self.prompt.iter().chain(self.output).skip(from).copied()
    }
}

/// A guess of how a text goes on.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    /// The next tokens, or none. A token that is not below the vocabulary ends the draft.
    pub tokens: Vec<u32>,
    /// The distribution that each token was drawn from, `[tokens, V]`, f32. `None` for tokens that were not drawn at random.
    pub probabilities: Option<Array>,
}

/// Proposes the next tokens of texts, more cheaply than their model.
///
/// The model reads a whole draft in one step. It keeps the tokens up to the first that it rejects, and adds one of its own. A
/// text's distribution is the same as without drafts, however bad they are. Where [`Draft::probabilities`] is `None`, every
/// token is the same too, except for how a device rounds products of other sizes.
pub trait Drafter {
    /// The vocabulary that it knows, if it knows of one: that of the model that is to be helped.
    fn vocabulary(&self) -> Option<i32> {
        None
    }

    /// A draft for each text, in order.
    ///
    /// # Errors
    /// Whenever the drafter likes; the step then goes without drafts.
    fn draft(&mut self, texts: &[DraftedText<'_>]) -> Result<Vec<Draft>>;

    /// Tells that a text has ended.
    fn end(&mut self, text: TextId) {
        let _ = text;
    }
}
