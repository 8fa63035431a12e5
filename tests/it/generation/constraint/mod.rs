//! Texts under constraints that are written by hand: what is drawn, how it ends, and what may go wrong.

mod drafted;
mod ends;
mod texts;
mod trouble;

use std::{fmt, sync::Arc};

use mlx_primitives::{
    generation::{
        Allowed, Completion, Constraint, ConstraintError, GenerationEngine, GenerationRequest,
    },
    sampling::TokenMask,
};

use super::{
    Decoder, all_texts, cache_bytes, engine, model::VOCABULARY, options, params, prompt, request,
};

/// What may follow a text, and whether it may end there.
type Answer = Result<(Vec<u32>, bool), ConstraintError>;
type Rule = Arc<dyn Fn(&[u32]) -> Answer + Send + Sync>;

/// A rule, and the tokens so far.
#[derive(Clone)]
struct Ruled {
    rule: Rule,
    tokens: Vec<u32>,
    stop_tokens: Vec<u32>,
    vocabulary: i32,
    /// Whether it says so as soon as it is complete.
    early: bool,
}

impl Ruled {
    fn new(rule: impl Fn(&[u32]) -> Answer + Send + Sync + 'static) -> Self {
        let (tokens, stop_tokens) = (Vec::new(), Vec::new());
        Self { rule: Arc::new(rule), tokens, stop_tokens, vocabulary: VOCABULARY, early: true }
    }
}

impl fmt::Debug for Ruled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ruled").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

impl Constraint for Ruled {
    fn vocabulary(&self) -> i32 {
        self.vocabulary
    }

    fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        let (open, end) = (self.rule)(&self.tokens)?;
        let mut tokens = TokenMask::none(self.vocabulary)?;
        open.into_iter().for_each(|token| tokens.allow(token));
        Ok(Allowed { tokens, end })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        let (open, _) = (self.rule)(&self.tokens)?;
        self.tokens.push(token);
        if open.contains(&token) { Ok(()) } else { Err("that was not allowed".into()) }
    }

    fn is_complete(&self) -> bool {
        self.early && (self.rule)(&self.tokens).is_ok_and(|(open, end)| open.is_empty() && end)
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

fn under(constraint: Ruled, request: GenerationRequest) -> GenerationRequest {
    GenerationRequest { constraint: Some(Arc::new(constraint)), ..request }
}

fn anything() -> Vec<u32> {
    (0..VOCABULARY.unsigned_abs()).collect()
}

/// Whether `token` may follow: a third of all, and after each text another.
fn third(text: &[u32], token: u32) -> bool {
    (text.iter().sum::<u32>() + token).is_multiple_of(3)
}

/// A third of all tokens after each text, and no end.
fn thirds() -> Ruled {
    Ruled::new(|text| Ok((anything().into_iter().filter(|&t| third(text, t)).collect(), false)))
}

/// The first text of each request, all asked for at once.
fn together(engine: &GenerationEngine, requests: &[GenerationRequest]) -> Vec<Completion> {
    all_texts(engine, requests).into_iter().map(|mut texts| texts.swap_remove(0)).collect()
}
