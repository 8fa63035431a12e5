//! One text that is being written.

use std::sync::Arc;

use crate::cache::SequenceId;

/// Which text: of which request, and of its completions which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) request: u64,
    pub(crate) choice: u32,
}

/// Stands in a text for the token that the step underway draws for it; it is above every vocabulary.
pub(crate) const AWAITED: u32 = u32::MAX;

/// What the step underway draws for a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Awaited {
    #[default]
    Nothing,
    Token,
    /// The text ends with it.
    LastToken,
}

/// A text, and how far the model has read it.
#[derive(Debug, Clone)]
pub(crate) struct Branch {
    pub(crate) key: Key,
    pub(crate) prompt: Arc<[u32]>,
    /// The last token may be [`AWAITED`].
    pub(crate) output: Vec<u32>,
    /// Who goes first: the higher.
    pub(crate) priority: i32,
    /// How many further texts begin with the prompt, once it is read.
    pub(crate) siblings: u32,
    /// What stands for the last token of `output`, unless nothing does.
    pub(super) awaited: Awaited,
    /// Where its keys and values are, while it runs.
    pub(super) sequence: Option<SequenceId>,
    /// The step at which it came.
    pub(super) since: u64,
    /// Its priority when it was let in, with what it had gained by waiting.
    pub(super) rank: i64,
}

impl Branch {
    pub(crate) fn new(key: Key, prompt: Arc<[u32]>, priority: i32, siblings: u32) -> Self {
        Self {
            key,
            prompt,
            output: Vec::new(),
            priority,
            siblings,
            awaited: Awaited::Nothing,
            sequence: None,
            since: 0,
            rank: 0,
        }
    }

    /// Tokens of prompt and output together.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.output.len()
    }

    /// Goes on by a token that is not drawn yet.
    pub(super) fn await_token(&mut self, is_last: bool) {
        self.awaited = if is_last { Awaited::LastToken } else { Awaited::Token };
        self.output.push(AWAITED);
    }

    /// Goes on by these tokens, the first of which may have been awaited. Returns where that is, if it was.
    pub(super) fn go_on(&mut self, tokens: &[u32]) -> Option<usize> {
        let awaited = std::mem::take(&mut self.awaited) != Awaited::Nothing;
        if awaited {
            self.output.pop();
        }
        let place = self.len();
        self.output.extend(tokens);
        awaited.then_some(place)
    }

    /// Prompt and output from token `from` on, `count` of them.
    pub(super) fn tokens(&self, from: usize, count: usize) -> Vec<u32> {
        self.prompt.iter().chain(&self.output).skip(from).take(count).copied().collect()
    }

    /// How many sequences it takes or will take.
    pub(super) fn width(&self) -> usize {
        1 + self.siblings as usize
    }

    /// The text of another choice, begun where this one's prompt ends.
    pub(super) fn sibling(&self, choice: u32, sequence: SequenceId) -> Self {
        let key = Key { choice, ..self.key };
        let (prompt, sequence) = (self.prompt.clone(), Some(sequence));
        let (since, rank) = (self.since, self.rank);
        Self { sequence, since, rank, ..Self::new(key, prompt, self.priority, 0) }
    }
}
