//! Guesses under constraints: what is drawn is what would be drawn without.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use mlx_primitives::{
    Result,
    generation::{
        Allowed, Constraint, ConstraintError, Draft, DraftModel, DraftModelOptions, DraftedText,
        Drafter, FinishReason, GenerationEngine, GenerationRequest, PromptLookup,
    },
    sampling::{SamplingParams, TokenMask},
};

use super::{
    Decoder, Ruled, VOCABULARY, anything, engine, options, params, prompt, request,
    texts::samplings, third, thirds, together, under,
};

/// Prompts that repeat themselves, so that there is something to look up.
fn requests() -> Vec<GenerationRequest> {
    let request = |seed| request(prompt(seed, 5).repeat(3), 24, samplings(seed));
    (0..12).map(request).collect()
}

fn drafted(drafter: impl Drafter + Send + 'static) -> GenerationEngine {
    GenerationEngine::with_drafter(Decoder::new(), drafter, options()).unwrap()
}

#[test]
fn what_is_looked_up_changes_no_token_and_no_end() {
    let lookup = PromptLookup::new(1, 3).unwrap();
    let short = |early| {
        let rule = |text: &[u32]| {
            let open = anything().into_iter().filter(|&token| third(text, token));
            Ok((if text.len() < 7 { open.collect() } else { Vec::new() }, text.len() >= 5))
        };
        Ruled { early, stop_tokens: vec![11], ..Ruled::new(rule) }
    };
    for (what, constraint) in
        [("endless", thirds()), ("short", short(true)), ("late", short(false))]
    {
        let bound = requests().into_iter().map(|request| under(constraint.clone(), request));
        let bound = bound.collect::<Vec<_>>();
        let engine_of_guesses = drafted(lookup);
        let guessed = together(&engine_of_guesses, &bound);
        for (guessed, plain) in guessed.iter().zip(together(&engine(options()), &bound)) {
            assert_eq!(
                (&guessed.tokens, &guessed.reason),
                (&plain.tokens, &plain.reason),
                "{what}"
            );
        }
        let stats = engine_of_guesses.stats();
        assert!(stats.accepted_tokens > 0 && stats.used_blocks == 0, "{what}: {stats:?}");
        let complete = guessed.iter().filter(|text| text.reason == FinishReason::Complete);
        assert_eq!(complete.count() > 0, what != "endless", "{what}");
    }
}

#[test]
fn what_a_model_drafts_freely_is_drawn_within_the_constraint() {
    let model = DraftModel::new(Decoder::new(), DraftModelOptions::default()).unwrap();
    let engine_of_guesses = drafted(model);
    let bound = requests().into_iter().map(|request| under(thirds(), request)).collect::<Vec<_>>();
    let texts = together(&engine_of_guesses, &bound);
    for ((text, request), plain) in
        texts.iter().zip(&bound).zip(together(&engine(options()), &bound))
    {
        for (place, &token) in text.tokens.iter().enumerate() {
            assert!(third(&text.tokens[..place], token), "{:?}", text.tokens);
        }
        if request.sampling.is_greedy() {
            assert_eq!((&text.tokens, &text.reason), (&plain.tokens, &plain.reason));
        }
    }
    let stats = engine_of_guesses.stats();
    assert!(stats.accepted_tokens > 0 && stats.accepted_tokens < stats.drafted_tokens, "{stats:?}");
}

/// Says whether it was ever given a token to stop at, which is none of a text.
#[derive(Debug, Clone)]
struct Endless(TokenMask, Arc<AtomicBool>);

impl Constraint for Endless {
    fn vocabulary(&self) -> i32 {
        self.0.vocabulary()
    }

    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        Ok(Allowed { tokens: self.0.clone(), end: true })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.1.fetch_or(!self.0.allows(token), Relaxed);
        Ok(())
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[test]
fn tokens_to_stop_at_may_be_drafted_and_are_none_of_the_text() {
    let model = DraftModel::new(Decoder::new(), DraftModelOptions::default()).unwrap();
    let mut tokens = TokenMask::all(VOCABULARY).unwrap();
    (0..9).for_each(|stop| tokens.forbid(stop));
    let given = Arc::new(AtomicBool::new(false));
    let bound = (0..40).map(|seed| {
        let sampling = SamplingParams { stop_tokens: (0..9).collect(), ..params(seed, 1.0) };
        let constraint = Arc::new(Endless(tokens.clone(), given.clone()));
        let request = request(prompt(seed, 5), 24, sampling);
        GenerationRequest { constraint: Some(constraint), ..request }
    });
    let texts = together(&drafted(model), &bound.collect::<Vec<_>>());
    let stopped = texts.iter().filter(|text| matches!(text.reason, FinishReason::StopToken(0..9)));
    assert!((30..=40).contains(&stopped.count()), "{texts:?}");
    assert!(!given.load(Relaxed));
}

/// Guesses sevens.
struct Sevens;

impl Drafter for Sevens {
    fn draft(&mut self, texts: &[DraftedText<'_>]) -> Result<Vec<Draft>> {
        Ok(vec![Draft { tokens: vec![7; 3], probabilities: None }; texts.len()])
    }
}

#[test]
fn what_goes_wrong_after_a_guess_that_nobody_draws_harms_no_text() {
    let rule = |text: &[u32]| match text.contains(&7) {
        true => Err("no sevens".into()),
        false => Ok((anything(), false)),
    };
    let seldom = |request: GenerationRequest| {
        let sampling = SamplingParams { logit_bias: vec![(7, -1000.0)], ..request.sampling };
        under(Ruled::new(rule), GenerationRequest { sampling, ..request })
    };
    let bound = requests().into_iter().map(seldom).collect::<Vec<_>>();
    let engine_of_guesses = drafted(Sevens);
    let guessed = together(&engine_of_guesses, &bound);
    for (guessed, plain) in guessed.iter().zip(together(&engine(options()), &bound)) {
        assert!(!matches!(plain.reason, FinishReason::Failed(_)), "{plain:?}");
        assert_eq!((&guessed.tokens, &guessed.reason), (&plain.tokens, &plain.reason));
    }
    assert!(engine_of_guesses.stats().drafted_tokens > 0);
}
