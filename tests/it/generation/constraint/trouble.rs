//! A constraint that goes wrong ends its own text, and no other.

use std::sync::Arc;

use mlx_primitives::{
    generation::{
        Allowed, Constraint, ConstraintError, Finish, FinishReason, GenerationEvent,
        GenerationRequest,
    },
    sampling::TokenMask,
};
use mlx_rs::Array;

use super::super::trouble::changed;
use super::{Ruled, anything, engine, options, params, prompt, request, together, under};

fn some(seed: u64) -> GenerationRequest {
    request(prompt(seed, 9), 8, params(seed, 1.0))
}

/// What goes wrong with the third token.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trouble {
    Fork,
    Allowed(bool),
    Accept(bool),
    Vocabulary,
    Nothing,
}

#[derive(Debug, Clone)]
struct Troubled {
    trouble: Trouble,
    tokens: usize,
}

impl Troubled {
    fn is_due(&self, trouble: Trouble) -> bool {
        self.tokens == 2 && self.trouble == trouble
    }
}

impl Constraint for Troubled {
    fn vocabulary(&self) -> i32 {
        61
    }

    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        assert!(!self.is_due(Trouble::Allowed(true)), "out of hands");
        if self.is_due(Trouble::Allowed(false)) {
            return Err("out of ideas".into());
        }
        let vocabulary = if self.is_due(Trouble::Vocabulary) { 60 } else { 61 };
        let mut tokens = TokenMask::all(vocabulary)?;
        if self.is_due(Trouble::Nothing) {
            tokens.clear();
        }
        Ok(Allowed { tokens, end: false })
    }

    fn accept(&mut self, _: u32) -> Result<(), ConstraintError> {
        assert!(!self.is_due(Trouble::Accept(true)), "out of hands");
        if self.is_due(Trouble::Accept(false)) {
            return Err("out of ideas".into());
        }
        self.tokens += 1;
        Ok(())
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn fork(&self) -> Box<dyn Constraint> {
        assert!(self.trouble != Trouble::Fork, "out of hands");
        Box::new(self.clone())
    }
}

#[test]
fn a_constraint_that_goes_wrong_fails_its_text_and_the_others_go_on() {
    let (ideas, hands) =
        ("the constraint failed: out of ideas", "the constraint panicked: out of hands");
    let free = (0..3).map(some).collect::<Vec<_>>();
    let engine = engine(options());
    let alone = together(&engine, &free);
    for (trouble, reason, tokens) in [
        (Trouble::Allowed(false), ideas, 2),
        (Trouble::Allowed(true), hands, 2),
        (Trouble::Accept(false), ideas, 2),
        (Trouble::Accept(true), hands, 2),
        (Trouble::Fork, hands, 0),
        (Trouble::Vocabulary, "the constraint answered for another vocabulary", 2),
        (Trouble::Nothing, "the constraint and the request allow no token in common", 2),
    ] {
        let constraint = Arc::new(Troubled { trouble, tokens: 0 });
        let bad = GenerationRequest { constraint: Some(constraint), ..some(1) };
        let requests = [&[bad][..], &free].concat();
        let texts = together(&engine, &requests);
        let failed = FinishReason::Failed(reason.to_owned());
        assert_eq!((&texts[0].reason, texts[0].tokens.len()), (&failed, tokens), "{trouble:?}");
        assert_eq!(texts[0].tokens, alone[1].tokens[..tokens], "{trouble:?}");
        for (text, alone) in texts[1..].iter().zip(&alone) {
            assert_eq!((&text.tokens, &text.reason), (&alone.tokens, &alone.reason), "{trouble:?}");
        }
        assert_eq!(engine.stats().used_blocks, 0);
    }
}

#[test]
fn of_several_texts_only_the_one_fails_whose_constraint_does() {
    // Whoever begins with an even token has nothing to go on with.
    let rule = |text: &[u32]| match text {
        [first, ..] if first % 2 == 0 => Err("an even beginning".into()),
        _ => Ok((anything(), false)),
    };
    let eight = GenerationRequest { n: 8, ..some(5) };
    let engine = engine(options());
    let free = engine.generate(eight.clone()).unwrap();
    let texts = engine.generate(under(Ruled::new(rule), eight)).unwrap();
    let mut failed = 0;
    for (text, free) in texts.iter().zip(&free) {
        if free.tokens[0].is_multiple_of(2) {
            let reason = "the constraint failed: an even beginning".to_owned();
            assert_eq!(text.reason, FinishReason::Failed(reason));
            failed += 1;
        } else {
            assert_eq!((&text.tokens, &text.reason), (&free.tokens, &free.reason));
        }
    }
    assert!((1..8).contains(&failed), "{failed}");
    assert_eq!(engine.stats().used_blocks, 0);
}

#[test]
fn a_text_fails_whose_model_gives_no_chance_to_what_is_allowed() {
    let never = |logits: Array| {
        let shut = (0..61).map(|token| if token == 7 { f32::NEG_INFINITY } else { 0.0 });
        logits.add(Array::from_slice(&shut.collect::<Vec<_>>(), &[61]))
    };
    let engine = changed(never, options());
    let seven = || Ruled::new(|text| Ok((if text.len() < 2 { vec![8] } else { vec![7] }, false)));
    for temperature in [0.0, 1.0] {
        let asked = GenerationRequest { sampling: params(1, temperature), ..some(1) };
        let texts = together(&engine, &[under(seven(), asked.clone()), asked]);
        let reason = "the model gives no chance to any token that the constraint allows";
        assert_eq!(texts[0].tokens, [8, 8]);
        assert_eq!(texts[0].reason, FinishReason::Failed(reason.to_owned()));
        assert_eq!(texts[1].reason, FinishReason::Length);
    }
}

#[test]
fn constraints_that_no_engine_can_keep_are_refused() {
    let engine = engine(options());
    let refusal = |constraint| engine.submit(under(constraint, some(1))).unwrap_err().to_string();
    let any = || Ruled::new(|_| Ok((anything(), true)));
    assert_eq!(
        refusal(Ruled { vocabulary: 60, stop_tokens: vec![99], ..any() }),
        "[GenerationRequest] constraint must be of 61 tokens but got 60"
    );
    assert_eq!(
        refusal(Ruled { stop_tokens: vec![61], ..any() }),
        "[SamplingParams] stop_tokens must hold ids below 61 but got 61"
    );
    assert_eq!(engine.stats().finished, 0);
}

#[test]
fn a_failed_text_says_what_was_held_back() {
    let rule = |text: &[u32]| match text.len() {
        0..4 => Ok((vec![0], false)),
        _ => Err("enough".into()),
    };
    let request = GenerationRequest { stop_strings: vec!["aaab".to_owned()], ..some(1) };
    let events = engine(options()).submit(under(Ruled::new(rule), request)).unwrap();
    let Some(GenerationEvent::Finish(Finish { text, reason, .. })) = events.last() else {
        panic!("no end")
    };
    let failed = FinishReason::Failed("the constraint failed: enough".to_owned());
    assert_eq!((text.as_str(), reason), ("aaa", failed));
}
