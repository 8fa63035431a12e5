//! Where a text ends that has a constraint, and for which reason.

use std::sync::Arc;

use mlx_primitives::{
    generation::{
        Allowed, Completion, Constraint, ConstraintError, FinishReason, GenerationRequest,
    },
    sampling::SamplingParams,
};

use super::{
    Answer, Ruled, VOCABULARY, anything, engine, options, params, prompt, request, together, under,
};

fn written(constraint: Ruled, request: GenerationRequest) -> Completion {
    together(&engine(options()), &[under(constraint, request)]).swap_remove(0)
}

fn some(seed: u64) -> GenerationRequest {
    request(prompt(seed, 9), 12, params(seed, 1.0))
}

/// Any tokens, `count` of them.
fn exactly(count: usize) -> impl Fn(&[u32]) -> Answer {
    move |text| Ok(if text.len() < count { (anything(), false) } else { (vec![], true) })
}

#[test]
fn a_text_that_is_complete_ends_at_once() {
    for seed in 0..6 {
        let free = together(&engine(options()), &[some(seed)]).swap_remove(0);
        for early in [true, false] {
            for max_tokens in [4, 5, 12].into_iter().skip(usize::from(!early)) {
                let rule = Ruled { early, ..Ruled::new(exactly(4)) };
                let text = written(rule, GenerationRequest { max_tokens, ..some(seed) });
                assert_eq!(
                    (&text.tokens[..], text.reason),
                    (&free.tokens[..4], FinishReason::Complete)
                );
            }
            let rule = Ruled { early, ..Ruled::new(exactly(0)) };
            let text = written(rule, some(seed));
            assert_eq!((text.tokens, text.reason), (vec![], FinishReason::Complete));
            // What it does not reach, it does not complete.
            let rule = Ruled { early, ..Ruled::new(exactly(13)) };
            assert_eq!(written(rule, some(seed)).reason, FinishReason::Length);
        }
    }
}

/// Complete from the start, and angry if it is asked what follows.
#[derive(Debug)]
struct Over;

impl Constraint for Over {
    fn vocabulary(&self) -> i32 {
        VOCABULARY
    }

    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        Err("nothing follows".into())
    }

    fn accept(&mut self, _: u32) -> Result<(), ConstraintError> {
        Err("nothing followed".into())
    }

    fn is_complete(&self) -> bool {
        true
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self)
    }
}

#[test]
fn what_is_complete_is_not_asked_what_follows() {
    let over = GenerationRequest { constraint: Some(Arc::new(Over)), ..some(1) };
    let text = together(&engine(options()), &[over]).swap_remove(0);
    assert_eq!((text.tokens, text.reason), (vec![], FinishReason::Complete));
}

#[test]
fn stop_tokens_are_drawn_where_a_text_may_end_and_only_there() {
    let mut stopped = 0;
    for seed in 0..40 {
        // Half of all tokens end a text, after three, six, nine.
        let stop_tokens = (0..30).collect::<Vec<_>>();
        let rule = Ruled::new(|text| Ok((anything(), text.len() % 3 == 0 && !text.is_empty())));
        let sampling = SamplingParams { stop_tokens, ..params(seed, 1.0) };
        let own = written(rule.clone(), GenerationRequest { sampling, ..some(seed) });
        let rule = Ruled { stop_tokens: (0..30).collect(), ..rule };
        let text = written(rule, some(seed));
        assert_eq!(own, text, "of the request or of its constraint");
        assert!(text.tokens.iter().all(|token| *token >= 30), "{text:?}");
        match text.reason {
            FinishReason::StopToken(stop) => {
                assert!(stop < 30 && matches!(text.tokens.len(), 3 | 6 | 9), "{text:?}");
                stopped += 1;
            }
            reason => assert_eq!((reason, text.tokens.len()), (FinishReason::Length, 12)),
        }
    }
    assert!((20..40).contains(&stopped), "{stopped}");
}

#[test]
fn a_minimum_of_tokens_keeps_stop_tokens_away_but_cannot_make_a_text_longer_than_it_may_be() {
    for seed in 0..20 {
        let stop_tokens = (0..30).collect();
        let sampling = SamplingParams { stop_tokens, min_tokens: 6, ..params(seed, 1.0) };
        let asked = || GenerationRequest { sampling: sampling.clone(), ..some(seed) };
        let text = written(Ruled::new(|_| Ok((anything(), true))), asked());
        assert!(text.tokens.len() >= 6 && text.tokens.iter().all(|token| *token >= 30));
        let text = written(Ruled::new(exactly(4)), asked());
        assert_eq!((text.tokens.len(), text.reason), (4, FinishReason::Complete));
    }
}

#[test]
fn a_stop_string_ends_a_text_before_its_constraint_does() {
    // Of tokens that are a letter each.
    let letters =
        |text: &[u32]| Ok(if text.len() < 8 { ((0..52).collect(), false) } else { (vec![], true) });
    let whole = written(Ruled::new(letters), some(3));
    assert_eq!((whole.text.len(), &whole.reason), (8, &FinishReason::Complete), "{whole:?}");
    for (stop, end) in [(&whole.text[2..4], 4), (&whole.text[6..8], 8)] {
        let stop_strings = vec![stop.to_owned()];
        let request = GenerationRequest { stop_strings, ..some(3) };
        let text = written(Ruled::new(letters), request);
        assert_eq!(text.reason, FinishReason::StopString(stop.to_owned()));
        assert!(text.tokens.len() <= end && whole.text.starts_with(&text.text), "{text:?}");
    }
}

#[test]
fn what_the_request_does_not_want_is_not_drawn_either() {
    let even = || Ruled::new(|_| Ok(((0..60).step_by(2).collect(), true)));
    for seed in 0..10 {
        let sampling = SamplingParams {
            banned_tokens: vec![0, 4],
            allowed_tokens: Some(vec![0, 1, 2, 3, 4, 6]),
            ..params(seed, 1.0)
        };
        let text = written(even(), GenerationRequest { sampling, ..some(seed) });
        assert!(text.tokens.iter().all(|token| [2, 6].contains(token)), "{text:?}");
        assert_eq!(text.tokens.len(), 12);
        // Nothing in common but the end.
        let sampling = SamplingParams { allowed_tokens: Some(vec![1, 3, 5]), ..params(seed, 1.0) };
        let text = written(even(), GenerationRequest { sampling, ..some(seed) });
        assert_eq!((text.tokens, text.reason), (vec![], FinishReason::Complete));
    }
}
