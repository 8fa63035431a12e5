//! Drafts without a model: a text that repeats itself will do so again.

use super::{Draft, DraftedText, Drafter};
use crate::{check::Check, error::Result};

const CHECK: Check = Check::op("PromptLookup");

/// Guesses that what came after the last tokens before, in prompt or output, comes after them again: of the longest run that
/// was there before, the latest.
///
/// It costs next to nothing, and helps where texts quote: summaries, answers from documents, edits of code.
///
/// # Example
/// ```
/// use mlx_primitives::generation::PromptLookup;
///
/// let lookup = PromptLookup::new(2, 4)?;
/// let text = [7, 1, 2, 9, 8, 1, 2];
/// assert_eq!(lookup.find(&text, 3), [9, 8, 1]);
/// assert_eq!(lookup.find(&text[..4], 3), [0_u32; 0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Yang et al., [Inference with Reference: Lossless Acceleration of Large Language
/// Models](https://arxiv.org/abs/2304.04487), 2023.
#[derive(Debug, Clone, Copy)]
pub struct PromptLookup {
    shortest: usize,
    longest: usize,
}

impl Default for PromptLookup {
    /// Runs of 2 to 4 tokens.
    fn default() -> Self {
        Self { shortest: 2, longest: 4 }
    }
}

impl PromptLookup {
    /// Looks for runs of `shortest` to `longest` tokens.
    ///
    /// # Errors
    /// When `shortest` is zero or above `longest`.
    pub fn new(shortest: usize, longest: usize) -> Result<Self> {
        let known = (1..=longest).contains(&shortest);
        CHECK.value(
            known,
            "shortest",
            format_args!("be from 1 to longest = {longest}"),
            shortest,
        )?;
        Ok(Self { shortest, longest })
    }

    /// Up to `limit` tokens after the run that the last ones repeat.
    pub fn find(&self, text: &[u32], limit: usize) -> Vec<u32> {
        let found = self.latest(text).unwrap_or(text.len());
        text[found..].iter().copied().take(limit).collect()
    }

    /// Where the latest of the longest runs ends that stood before as the last tokens stand.
    fn latest(&self, text: &[u32]) -> Option<usize> {
        let same = |end: &usize| {
            let pairs = text[..*end].iter().rev().zip(text.iter().rev());
            pairs.take(self.longest).take_while(|(one, other)| one == other).count()
        };
        // Of equally long ones `max_by_key` takes the last.
        let longest = (1..text.len()).max_by_key(same)?;
        (same(&longest) >= self.shortest).then_some(longest)
    }
}

impl Drafter for PromptLookup {
    fn draft(&mut self, texts: &[DraftedText<'_>]) -> Result<Vec<Draft>> {
        let draft = |text: &DraftedText| {
            let tokens = self.find(&text.tokens(0).collect::<Vec<_>>(), text.limit);
            Draft { tokens, probabilities: None }
        };
        Ok(texts.iter().map(draft).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_run_counts_and_of_equal_ones_the_latest() {
        let lookup = PromptLookup::default();
        //          v-----v              v--v              v-----v
        let text = [1, 2, 3, 4, 0, 5, 9, 2, 3, 6, 0, 5, 5, 1, 2, 3];
        assert_eq!(lookup.find(&text, 2), [4, 0]);
        let text = [2, 3, 4, 0, 2, 3, 6, 7, 2, 3];
        assert_eq!(lookup.find(&text, 9), [6, 7, 2, 3]);
    }

    #[test]
    fn what_is_new_or_short_is_not_found() {
        let lookup = PromptLookup::default();
        for text in [&[][..], &[1], &[1, 1], &[1, 2, 3, 4], &[3, 1, 2, 1]] {
            assert_eq!(lookup.find(text, 5), [0_u32; 0], "{text:?}");
        }
        assert_eq!(lookup.find(&[1, 1, 1], 5), [1]);
        assert_eq!(lookup.find(&[1, 2, 9, 1, 2], 0), [0_u32; 0]);
    }

    #[test]
    fn runs_of_no_length_are_refused() {
        let message = |shortest, longest| {
            PromptLookup::new(shortest, longest).map_err(|error| error.to_string()).err()
        };
        let refused = "[PromptLookup] shortest must be from 1 to longest = 3 but got 0";
        assert_eq!(message(0, 3), Some(refused.to_owned()));
        assert!(message(4, 3).is_some() && message(3, 3).is_none());
    }
}
