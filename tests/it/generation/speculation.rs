//! Texts that somebody guesses are those that nobody does, or of the same distribution.

use mlx_primitives::{
    Result,
    attention::KvCache,
    generation::{
        CausalModel, Completion, Draft, DraftModel, DraftModelOptions, DraftedText, Drafter,
        FinishReason, GenerationEngine, GenerationEngineOptions, GenerationRequest, LayerKv,
        PromptLookup,
    },
    sampling::{Dry, Mirostat, SamplingParams, Xtc},
};
use mlx_rs::{Array, Dtype, error::Exception};

use super::{
    Decoder, cache_bytes, options, params, prompt, request,
    texts::{expected, requests, together},
};
use crate::{sampling::assert_follow, support::sample::Random};

fn drafted(
    drafter: impl Drafter + Send + 'static,
    options: GenerationEngineOptions,
) -> GenerationEngine {
    GenerationEngine::with_drafter(Decoder::new(), drafter, options).unwrap()
}

fn draft_model(decoder: Decoder) -> DraftModel<Decoder> {
    DraftModel::new(decoder, DraftModelOptions::default()).unwrap()
}

/// The requests that are greedy, and longer, so that there is something to guess.
fn greedy_requests() -> Vec<GenerationRequest> {
    let greedy = requests(24).into_iter().filter(|request| request.sampling.temperature == 0.0);
    greedy.map(|request| GenerationRequest { max_tokens: 20, ..request }).collect()
}

#[test]
fn what_a_prompt_says_already_changes_no_token() {
    // Prompts that repeat themselves, and tokens after few of them, so that runs come again.
    let requests = requests(24).into_iter().enumerate().map(|(number, request)| {
        let part = &prompt(number as u64, 5);
        let sampling = SamplingParams { top_k: 2, ..request.sampling };
        let sampling = match number % 5 {
            0 => SamplingParams {
                dry: Some(Dry { multiplier: 0.5, range: 9, ..Default::default() }),
                ..sampling
            },
            1 => SamplingParams {
                xtc: Some(Xtc { probability: 0.5, ..Default::default() }),
                ..sampling
            },
            _ => sampling,
        };
        let top_log_probabilities = number as i32 % 3;
        let prompt = part.repeat(3);
        GenerationRequest { prompt, max_tokens: 20, sampling, top_log_probabilities, ..request }
    });
    let requests = requests.collect::<Vec<_>>();
    let expected = expected(&requests);
    let lookup = PromptLookup::new(1, 3).unwrap();
    let small = GenerationEngineOptions { cache_bytes: cache_bytes(160), ..options() };
    let tight = GenerationEngineOptions { max_batch_tokens: 12, max_prompt_chunk: 7, ..options() };
    for (what, options) in [("", options()), ("few blocks", small), ("few tokens", tight)] {
        let engine = drafted(lookup, options);
        assert_eq!(together(&engine, &requests), expected, "{what}");
        let stats = engine.stats();
        assert!(stats.accepted_tokens > 20, "{what}: {stats:?}");
        assert!(stats.drafted_tokens > stats.accepted_tokens, "{what}: {stats:?}");
        assert_eq!((stats.used_blocks, stats.preemptions > 0), (0, what == "few blocks"));
        assert_eq!(stats.generated_tokens, 24 * 20, "{what}");
    }
}

#[test]
fn greedy_texts_are_exact_whoever_drafts() {
    let requests = greedy_requests();
    let expected = expected(&requests);
    for (what, decoder) in [("itself", Decoder::new()), ("another", Decoder::of(5000))] {
        let engine = drafted(draft_model(decoder), options());
        assert_eq!(together(&engine, &requests), expected, "{what}");
        let stats = engine.stats();
        assert!(stats.drafted_tokens > 80, "{what}: {stats:?}");
        assert_eq!(stats.accepted_tokens == stats.drafted_tokens, what == "itself", "{stats:?}");
    }
}

#[test]
fn a_model_keeps_what_it_drafts_itself() {
    let sampling = |seed| SamplingParams { top_p: 0.9, ..params(seed, 0.8) };
    let requests =
        (0..12).map(|seed| request(prompt(seed, 9 + 5 * seed as usize), 20, sampling(seed)));
    let engine = drafted(draft_model(Decoder::new()), options());
    together(&engine, &requests.collect::<Vec<_>>());
    let stats = engine.stats();
    assert!(stats.drafted_tokens > 150, "{stats:?}");
    assert!(stats.accepted_tokens + 3 > stats.drafted_tokens, "but for rounding: {stats:?}");
    assert!(stats.steps < 12 * 20 / 4, "{stats:?}");
}

#[test]
fn several_texts_of_a_prompt_are_drafted_apart() {
    let engine = drafted(draft_model(Decoder::of(5000)), options());
    let four = GenerationRequest { n: 4, ..request(prompt(9, 21), 20, params(7, 1.0)) };
    let texts = engine.generate(four).unwrap();
    for (number, text) in texts.iter().enumerate() {
        assert_eq!((text.tokens.len(), &text.reason), (20, &FinishReason::Length));
        assert!(texts[..number].iter().all(|other| other.tokens != text.tokens));
    }
    assert_eq!(engine.stats().used_blocks, 0);
}

#[test]
fn a_drafter_without_room_drafts_nothing() {
    let small = DraftModelOptions {
        cache_bytes: cache_bytes(32),
        max_batch_tokens: 7,
        ..Default::default()
    };
    let requests = greedy_requests();
    let engine = drafted(DraftModel::new(Decoder::new(), small).unwrap(), options());
    assert_eq!(together(&engine, &requests), expected(&requests));
    let stats = engine.stats();
    assert!(stats.drafted_tokens > 0 && stats.drafted_tokens < 100, "{stats:?}");
}

#[test]
fn mirostat_sees_every_token() {
    let mirostat = Some(Mirostat { tau: 2.0, eta: 0.3 });
    let one = request(prompt(3, 9).repeat(2), 20, SamplingParams { mirostat, ..params(5, 1.0) });
    let engine = drafted(PromptLookup::new(1, 3).unwrap(), options());
    let text = engine.generate(one.clone()).unwrap().swap_remove(0);
    assert_eq!(engine.stats().drafted_tokens, 0);
    let alone = super::engine(options()).generate(one).unwrap().swap_remove(0);
    assert_eq!(text.tokens, alone.tokens);
}

/// A drafter that does as it is told.
struct Told<F>(F);

impl<F: FnMut(&[DraftedText<'_>]) -> Result<Vec<Draft>>> Drafter for Told<F> {
    fn draft(&mut self, texts: &[DraftedText<'_>]) -> Result<Vec<Draft>> {
        (self.0)(texts)
    }
}

#[test]
fn a_drafter_that_goes_wrong_harms_nobody() {
    let requests = greedy_requests();
    let expected = expected(&requests);
    let burns = |_: &[DraftedText]| -> Result<Vec<Draft>> { panic!("the drafter burns") };
    let fails = |_: &[DraftedText]| Err(Exception::custom("the drafter fails").into());
    let of = |tokens: Vec<u32>, shape: [i32; 2]| {
        move |texts: &[DraftedText]| {
            let probabilities = Some(Array::full::<f32>(&shape, Array::from_f32(1.0)).unwrap());
            Ok(vec![Draft { tokens: tokens.clone(), probabilities }; texts.len()])
        }
    };
    let none = |_: &[DraftedText]| Ok(Vec::new());
    let long = |texts: &[DraftedText]| {
        Ok(vec![Draft { tokens: vec![7; 100], probabilities: None }; texts.len()])
    };
    let check = |what: &str, engine: GenerationEngine, drafts: bool| {
        assert_eq!(together(&engine, &requests), expected, "{what}");
        assert_eq!(engine.stats().drafted_tokens > 0, drafts, "{what}");
    };
    check("panics", drafted(Told(burns), options()), false);
    check("fails", drafted(Told(fails), options()), false);
    check("few", drafted(Told(none), options()), false);
    check("narrow", drafted(Told(of(vec![1, 2], [2, 60])), options()), false);
    // Where only one token is wanted, there is a row for it.
    check("short", drafted(Told(of(vec![1, 2], [1, 61])), options()), true);
    check("unknown", drafted(Told(of(vec![61, 2], [2, 61])), options()), false);
    check("known at first", drafted(Told(of(vec![1, u32::MAX], [2, 61])), options()), true);
    check("long", drafted(Told(long), options()), true);
}

#[test]
fn a_drafter_of_another_vocabulary_is_refused() {
    let small = DraftModel::new(Chain::new(1, 0.0), DraftModelOptions::default()).unwrap();
    let refused = GenerationEngine::with_drafter(Decoder::new(), small, options()).unwrap_err();
    let message = "[GenerationEngine] drafter must have the model's vocabulary of 61 but got 5";
    assert_eq!(refused.to_string(), message);
    let nothing = DraftModelOptions { max_batch_tokens: 0, ..Default::default() };
    let refused = DraftModel::new(Decoder::new(), nothing).unwrap_err().to_string();
    assert!(refused.starts_with("[DraftModel] max_batch_tokens must be at least 1"), "{refused}");
}

/// A model that looks at the last token alone, so that every text's probability is known.
pub(super) struct Chain {
    logits: Vec<f32>,
    table: Array,
}

const STATES: usize = 5;

impl Chain {
    /// The chain of `seed`, and so much of another one.
    pub(super) fn new(seed: u64, noise: f64) -> Self {
        let (mut random, mut other) = (Random::new(seed), Random::new(seed + 1000));
        let logits = (0..STATES * STATES).map(|_| 1.2 * random.normal() + noise * other.normal());
        let logits = logits.map(|logit| logit as f32).collect::<Vec<_>>();
        let table = Array::from_slice(&logits, &[STATES as i32; 2]);
        Self { logits, table }
    }

    /// How likely each text of three tokens is after token 0.
    fn texts(&self, temperature: f64) -> Vec<f64> {
        let row = |state: usize| {
            let weights = self.logits[state * STATES..][..STATES].iter();
            let weights = weights.map(|&logit| (f64::from(logit) / temperature).exp());
            let weights = weights.collect::<Vec<_>>();
            let sum = weights.iter().sum::<f64>();
            weights.into_iter().map(move |weight| weight / sum).collect::<Vec<_>>()
        };
        let mut texts = Vec::new();
        for (first, p) in row(0).into_iter().enumerate() {
            for (second, q) in row(first).into_iter().enumerate() {
                texts.extend(row(second).into_iter().map(|r| p * q * r));
            }
        }
        texts
    }
}

impl CausalModel for Chain {
    fn vocabulary(&self) -> i32 {
        STATES as i32
    }

    fn layers(&self) -> Vec<LayerKv> {
        Vec::new()
    }

    fn hidden(&mut self, tokens: &Array, _: &mut [&mut dyn KvCache]) -> Result<Array, Exception> {
        self.table.take_axis(tokens, 0)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        hidden.as_dtype(Dtype::Float32)
    }
}

/// A token that ends a text, and is drawn often enough to be missed.
const STOP: u32 = 2;

/// The place of a text among those of three tokens; one that has ended stays as it is.
fn place(tokens: &[u32]) -> u32 {
    let length = tokens.iter().position(|&token| token == STOP).unwrap_or(tokens.len());
    let padded = tokens[..length].iter().copied().chain(std::iter::repeat(STOP));
    padded.take(3).fold(0, |place, token| place * STATES as u32 + token)
}

#[test]
fn drafts_leave_the_distribution_of_texts_as_it_is() {
    const TEXTS: u64 = 12_800;
    for (temperature, stops) in [(0.7, false), (1.0, false), (1.0, true)] {
        let mut expected = Chain::new(3, 0.0).texts(temperature);
        if stops {
            let likely = std::mem::replace(&mut expected, vec![0.0; STATES.pow(3)]);
            for (number, p) in (0..).zip(likely) {
                expected[place(&[number / 25, number / 5 % 5, number % 5]) as usize] += p;
            }
        }
        let drafts =
            [("good", Chain::new(3, 0.3), 0.7..0.99), ("bad", Chain::new(77, 0.0), 0.1..0.7)];
        for (what, draft, kept) in drafts {
            let draft = DraftModel::new(draft, DraftModelOptions::default()).unwrap();
            let options = GenerationEngineOptions { max_batch_size: 64, ..Default::default() };
            let model = Chain::new(3, 0.0);
            let engine = GenerationEngine::with_drafter(model, draft, options).unwrap();
            let requests = (0..TEXTS / 64).map(|number| {
                let stop_tokens = if stops { vec![STOP] } else { Vec::new() };
                let sampling =
                    SamplingParams { stop_tokens, ..params(64 * number, temperature as f32) };
                GenerationRequest { n: 64, ..request(vec![0], 3, sampling) }
            });
            let texts = requests.flat_map(|request| engine.generate(request).unwrap());
            // Each text is a number of three digits.
            let number = |text: Completion| match stops {
                true => place(&text.tokens),
                false => text.tokens.iter().fold(0, |place, &token| place * STATES as u32 + token),
            };
            let stopping = if stops { ", ending" } else { "" };
            let of = format!("texts by {what} drafts at {temperature}{stopping}");
            assert_follow(&of, &texts.map(number).collect::<Vec<_>>(), &expected);
            let stats = engine.stats();
            let share = stats.accepted_tokens as f64 / stats.drafted_tokens as f64;
            assert!(kept.contains(&share), "{what} at {temperature}: {share} kept");
        }
    }
}
