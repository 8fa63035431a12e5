//! The constraints of the texts that are being written: each text's own, however often it waits and is read again.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::{
    constraint::{Allowed, Constraint, ConstraintError},
    panicked::message,
    samplers::Text,
    scheduler::Key,
};
use crate::sampling::{SamplingParams, TokenMask};

const NOTHING_ALLOWED: &str = "the constraint and the request allow no token in common";
const OTHER_VOCABULARY: &str = "the constraint answered for another vocabulary";
const OTHER_FORK: &str = "the constraint does not do as its fork did";
const NOTHING_DRAWN: &str = "the model gives no chance to any token that the constraint allows";

/// The constraints of all texts that have one and have begun.
#[derive(Debug, Default)]
pub(super) struct Constraints {
    states: HashMap<Key, Box<dyn Constraint>>,
    /// What each text may go on by that is being drawn for: first, and after each of its drafts.
    next: HashMap<Key, VecDeque<Next>>,
}

/// What may come next in a text.
#[derive(Debug)]
enum Next {
    Tokens(TokenMask),
    Nothing,
    Failed(String),
}

/// How a text stands after a token was drawn for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The token is its next.
    GoesOn,
    /// The token is its last.
    Completed,
    /// It was complete before, and the token is none of it.
    WasComplete,
    /// The token is none of it, for this reason.
    Failed(String),
}

impl Constraints {
    /// What each row of each text may draw from of so many tokens; none where that is everything, or where it does not matter
    /// any more.
    pub(super) fn masks(&mut self, vocabulary: i32, texts: &[Text]) -> Vec<Option<&TokenMask>> {
        self.next.clear();
        for text in texts {
            if let Some(first) = &text.request.constraint {
                let next = self.ahead(text, &**first, vocabulary);
                let next = next.unwrap_or_else(|reason| vec![Next::Failed(reason)]);
                self.next.insert(text.key, next.into());
            }
        }
        let of_text = |text: &Text| {
            let next = self.next.get(&text.key);
            (0..=text.drafts.len()).map(move |place| match next?.get(place)? {
                Next::Tokens(mask) => Some(mask),
                Next::Nothing | Next::Failed(_) => None,
            })
        };
        texts.iter().flat_map(of_text).collect()
    }

    /// What a text may go on by, and after each of its drafts that it may, as its constraint says, which begins as `first` is.
    fn ahead(
        &mut self,
        text: &Text,
        first: &dyn Constraint,
        vocabulary: i32,
    ) -> Result<Vec<Next>, String> {
        let state = match self.states.entry(text.key) {
            Entry::Occupied(state) => state.into_mut(),
            Entry::Vacant(place) => place.insert(caught(|| Ok(first.fork()))?),
        };
        if caught(|| Ok(state.is_complete()))? {
            return Ok(vec![Next::Nothing]);
        }
        let mut steps = vec![next(&mut **state, text, 0, vocabulary)?];
        // What goes wrong after a guess concerns the text only if it gets there.
        if let Err(reason) = follow(&**state, text, vocabulary, &mut steps) {
            steps.push(Next::Failed(reason));
        }
        Ok(steps)
    }

    /// Takes in what was drawn for a text.
    pub(super) fn accept(&mut self, key: Key, token: u32, stop_tokens: &[u32]) -> Verdict {
        let mask = match self.next.get_mut(&key).and_then(VecDeque::pop_front) {
            Some(Next::Tokens(mask)) => mask,
            Some(Next::Nothing) => return Verdict::WasComplete,
            Some(Next::Failed(reason)) => return Verdict::Failed(reason),
            None if self.states.contains_key(&key) => {
                return Verdict::Failed(OTHER_FORK.to_owned());
            }
            None => return Verdict::GoesOn,
        };
        let Some(state) = self.states.get_mut(&key).filter(|_| mask.allows(token)) else {
            return Verdict::Failed(NOTHING_DRAWN.to_owned());
        };
        if stop_tokens.contains(&token) {
            return Verdict::GoesOn;
        }
        let complete = caught(|| state.accept(token).map(|()| state.is_complete()));
        match complete {
            Ok(true) => Verdict::Completed,
            Ok(false) => Verdict::GoesOn,
            Err(reason) => Verdict::Failed(reason),
        }
    }

    /// Forgets a text.
    pub(super) fn remove(&mut self, key: Key) {
        self.states.remove(&key);
        self.next.remove(&key);
    }
}

/// What a text may go on by after so many of its drafts, which a constraint allows and the request as well.
fn next(
    state: &mut dyn Constraint,
    text: &Text,
    place: usize,
    vocabulary: i32,
) -> Result<Next, String> {
    let Allowed { tokens: mut mask, end } = caught(|| state.allowed())?;
    if mask.vocabulary() != vocabulary {
        return Err(OTHER_VOCABULARY.to_owned());
    }
    let sampling = &text.request.sampling;
    sampling.stop_tokens.iter().for_each(|&token| mask.forbid(token));
    refuse(&mut mask, sampling);
    match (mask.is_empty(), end) {
        (true, true) => return Ok(Next::Nothing),
        (true, false) => return Err(NOTHING_ALLOWED.to_owned()),
        (false, true) if text.output.len() + place >= sampling.min_tokens as usize => {
            sampling.stop_tokens.iter().for_each(|&token| mask.allow(token));
            refuse(&mut mask, sampling);
        }
        (false, _) => {}
    }
    Ok(Next::Tokens(mask))
}

/// What a text may go on by after each of its drafts that it may have, and that does not complete it.
fn follow(
    state: &dyn Constraint,
    text: &Text,
    vocabulary: i32,
    steps: &mut Vec<Next>,
) -> Result<(), String> {
    if text.drafts.is_empty() {
        return Ok(());
    }
    let mut ahead = caught(|| Ok(state.fork()))?;
    for (place, &draft) in (1..).zip(text.drafts) {
        let may_follow = matches!(steps.last(), Some(Next::Tokens(mask)) if mask.allows(draft));
        if !may_follow || text.request.sampling.stop_tokens.contains(&draft) {
            return Ok(());
        }
        if caught(|| ahead.accept(draft).map(|()| ahead.is_complete()))? {
            return Ok(());
        }
        steps.push(next(&mut *ahead, text, place, vocabulary)?);
    }
    Ok(())
}

/// Takes out what the request bans or does not allow: the draw would find it at −∞.
fn refuse(mask: &mut TokenMask, sampling: &SamplingParams) {
    sampling.banned_tokens.iter().for_each(|&token| mask.forbid(token));
    if let Some(only) = &sampling.allowed_tokens {
        let mut left = only.clone();
        left.retain(|&token| mask.allows(token));
        mask.clear();
        left.into_iter().for_each(|token| mask.allow(token));
    }
}

/// What a constraint answers, or in words what went wrong.
fn caught<T>(ask: impl FnOnce() -> Result<T, ConstraintError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(answer) => answer.map_err(|error| format!("the constraint failed: {error}")),
        Err(panic) => Err(format!("the constraint panicked: {}", message(&*panic))),
    }
}
