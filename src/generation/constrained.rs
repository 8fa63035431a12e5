//! The constraints of the texts that are being written: each text's own, however often it waits and is read again.

use std::{
    collections::{HashMap, hash_map::Entry},
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::{
    constraint::{Allowed, Constraint, ConstraintError},
    panicked::message,
    runner::Draws,
    scheduler::Key,
};
use crate::sampling::{SamplingParams, TokenMask};

const NOTHING_ALLOWED: &str = "the constraint and the request allow no token in common";
const OTHER_VOCABULARY: &str = "the constraint answered for another vocabulary";
const NOTHING_DRAWN: &str = "the model gives no chance to any token that the constraint allows";

/// The constraints of all texts that have one and have begun.
#[derive(Debug, Default)]
pub(super) struct Constraints {
    states: HashMap<Key, Box<dyn Constraint>>,
    /// What the next token of each text may be that is being drawn for.
    next: HashMap<Key, Next>,
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
    /// What each text may draw from of so many tokens; none where that is everything, or where it does not matter any more.
    pub(super) fn masks<'a>(
        &mut self,
        vocabulary: i32,
        texts: impl Iterator<Item = (Key, &'a Draws<'a>)>,
    ) -> Vec<Option<&TokenMask>> {
        self.next.clear();
        let mut keys = Vec::new();
        for (key, text) in texts {
            if let Some(constraint) = &text.request.constraint {
                let allowed = self.allowed(key, &**constraint, vocabulary);
                let next = allowed.and_then(|allowed| next(allowed, text));
                self.next.insert(key, next.unwrap_or_else(Next::Failed));
            }
            keys.push(key);
        }
        let mask = |key| match self.next.get(key) {
            Some(Next::Tokens(mask)) => Some(mask),
            _ => None,
        };
        keys.iter().map(mask).collect()
    }

    /// What a text's constraint allows, which begins as `first` is.
    fn allowed(
        &mut self,
        key: Key,
        first: &dyn Constraint,
        vocabulary: i32,
    ) -> Result<Allowed, String> {
        let state = match self.states.entry(key) {
            Entry::Occupied(state) => state.into_mut(),
            Entry::Vacant(place) => place.insert(caught(|| Ok(first.fork()))?),
        };
        let allowed = caught(|| state.allowed())?;
        let fits = allowed.tokens.vocabulary() == vocabulary;
        fits.then_some(allowed).ok_or_else(|| OTHER_VOCABULARY.to_owned())
    }

    /// Takes in what was drawn for a text.
    pub(super) fn accept(&mut self, key: Key, token: u32, stop_tokens: &[u32]) -> Verdict {
        let mask = match self.next.remove(&key) {
            Some(Next::Tokens(mask)) => mask,
            Some(Next::Nothing) => return Verdict::WasComplete,
            Some(Next::Failed(reason)) => return Verdict::Failed(reason),
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

/// What a constraint allows that the request does as well.
fn next(allowed: Allowed, text: &Draws) -> Result<Next, String> {
    let (Allowed { tokens: mut mask, end }, sampling) = (allowed, &text.request.sampling);
    sampling.stop_tokens.iter().for_each(|&token| mask.forbid(token));
    refuse(&mut mask, sampling);
    match (mask.is_empty(), end) {
        (true, true) => return Ok(Next::Nothing),
        (true, false) => return Err(NOTHING_ALLOWED.to_owned()),
        (false, true) if text.output.len() >= sampling.min_tokens as usize => {
            sampling.stop_tokens.iter().for_each(|&token| mask.allow(token));
            refuse(&mut mask, sampling);
        }
        (false, _) => {}
    }
    Ok(Next::Tokens(mask))
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
