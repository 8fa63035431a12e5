//! Which tokens may be drawn.

use crate::{check::Check, error::Result};

const CHECK: Check = Check::op("TokenMask");

/// A set of tokens of a vocabulary, as a bit for each.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::TokenMask;
///
/// let mut mask = TokenMask::none(40)?;
/// mask.allow(3);
/// mask.allow(39);
/// mask.forbid(3);
/// assert!(mask.allows(39) && !mask.allows(3));
/// assert_eq!(mask, TokenMask::from_words(40, vec![0, 1 << 7])?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    vocabulary: i32,
    /// The lowest bit of the first word is token 0; bits beyond the vocabulary are zero.
    words: Vec<u32>,
}

impl TokenMask {
    /// No token.
    ///
    /// # Errors
    /// When `vocabulary` is below one.
    pub fn none(vocabulary: i32) -> Result<Self> {
        Self::from_words(vocabulary, Vec::new())
    }

    /// Every token.
    ///
    /// # Errors
    /// As for [`Self::none`].
    pub fn all(vocabulary: i32) -> Result<Self> {
        Self::from_words(vocabulary, vec![u32::MAX; words(vocabulary)])
    }

    /// The tokens whose bits are set, from the lowest bit of the first word on. Words that are missing are zero, and bits
    /// beyond the vocabulary are forgotten.
    ///
    /// # Errors
    /// As for [`Self::none`].
    pub fn from_words(vocabulary: i32, mut bits: Vec<u32>) -> Result<Self> {
        CHECK.at_least("vocabulary", vocabulary, 1)?;
        bits.resize(words(vocabulary), 0);
        if let (Some(last), used @ 1..) = (bits.last_mut(), vocabulary % 32) {
            *last &= (1 << used) - 1;
        }
        Ok(Self { vocabulary, words: bits })
    }

    /// How many tokens there are, in the set or not.
    pub fn vocabulary(&self) -> i32 {
        self.vocabulary
    }

    /// Adds a token; one that the vocabulary has not is no part of any set.
    pub fn allow(&mut self, token: u32) {
        if let Some((word, bit)) = self.place(token) {
            self.words[word] |= bit;
        }
    }

    /// Takes a token out.
    pub fn forbid(&mut self, token: u32) {
        if let Some((word, bit)) = self.place(token) {
            self.words[word] &= !bit;
        }
    }

    /// Takes all tokens out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Whether a token is in the set.
    pub fn allows(&self, token: u32) -> bool {
        self.place(token).is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Whether no token is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The bits, eight tokens a byte, the lowest bit first.
    pub(super) fn bytes(&self) -> impl Iterator<Item = u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes())
    }

    fn place(&self, token: u32) -> Option<(usize, u32)> {
        (token < self.vocabulary.unsigned_abs()).then_some((token as usize / 32, 1 << (token % 32)))
    }
}

fn words(vocabulary: i32) -> usize {
    vocabulary.max(0).unsigned_abs().div_ceil(32) as usize
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panic")]

    use super::*;

    #[test]
    fn a_mask_is_a_set() {
        for vocabulary in [1_i32, 31, 32, 33, 64, 100] {
            let size = vocabulary.unsigned_abs();
            let (mut mask, mut set) = (TokenMask::none(vocabulary).unwrap(), Vec::new());
            assert!(mask.is_empty());
            for token in (0..size + 40).step_by(3) {
                mask.allow(token);
                set.push(token);
            }
            set.retain(|token| *token < size && token % 2 == 0);
            (0..size).filter(|token| token % 2 == 1).for_each(|token| mask.forbid(token));
            let found: Vec<_> = (0..size + 70).filter(|&token| mask.allows(token)).collect();
            assert_eq!(found, set, "{vocabulary}");
            assert_eq!(mask.bytes().count(), size.div_ceil(32) as usize * 4);
        }
    }

    #[test]
    fn bits_beyond_the_vocabulary_are_none() {
        for vocabulary in [1_i32, 31, 32, 33] {
            let all = TokenMask::all(vocabulary).unwrap();
            let more = TokenMask::from_words(vocabulary, vec![u32::MAX; 5]).unwrap();
            let mut each = TokenMask::none(vocabulary).unwrap();
            (0..vocabulary.unsigned_abs()).for_each(|token| each.allow(token));
            assert_eq!((&all, &more), (&each, &each));
        }
    }

    #[test]
    fn a_vocabulary_has_a_token() {
        for vocabulary in [0, -1] {
            let error = TokenMask::all(vocabulary).unwrap_err().to_string();
            let expected = "[TokenMask] vocabulary must be at least 1 but got ";
            assert_eq!(error, format!("{expected}{vocabulary}"));
        }
    }
}
