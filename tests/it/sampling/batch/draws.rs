//! Draws against exact probabilities: more than a million in all.

use mlx_primitives::sampling::{Dry, Mirostat, SamplingParams, Step, Xtc};
use mlx_rs::ops::broadcast_to;

use super::{LOGITS, Text, batch, oracle::probabilities, positions_from, rows_of, tokens};
use crate::sampling::assert_follow;

const DRAWS: usize = 60_000;
/// Rows of one batch: to make a history for each takes longer than to draw.
const ROWS: usize = 2_000;

pub(super) fn text() -> Text {
    let prompt = vec![0, 3, 2, 8, 4, 0, 3, 2, 11];
    let output = vec![5, 4, 0, 3, 2, 4, 0, 3, 2];
    Text { prompt, output, bound: 4.4 }
}

fn some() -> SamplingParams {
    SamplingParams { seed: 11, ..Default::default() }
}

/// Each sampler alone, then chains.
pub(super) fn cases() -> Vec<(&'static str, SamplingParams)> {
    let xtc = |probability| Xtc { probability, threshold: 0.08, protected: vec![2] };
    let dry =
        Dry { multiplier: 0.8, base: 1.5, range: 16, breakers: vec![11], ..Default::default() };
    let mirostat = Mirostat { tau: 2.2, eta: 0.1 };
    vec![
        ("nothing", some()),
        ("temperature", SamplingParams { temperature: 0.6, ..some() }),
        ("greedy", SamplingParams { temperature: 0.0, ..some() }),
        ("top-k", SamplingParams { top_k: 5, ..some() }),
        ("top-p", SamplingParams { top_p: 0.8, ..some() }),
        ("min-p", SamplingParams { min_p: 0.25, ..some() }),
        ("typical-p", SamplingParams { typical_p: 0.6, ..some() }),
        ("top-n-sigma", SamplingParams { top_n_sigma: Some(1.0), ..some() }),
        ("xtc", SamplingParams { xtc: Some(xtc(0.4)), ..some() }),
        (
            "xtc of all that is left",
            SamplingParams {
                top_k: 4,
                xtc: Some(Xtc { probability: 0.5, threshold: 0.0, protected: vec![] }),
                ..some()
            },
        ),
        ("dry", SamplingParams { dry: Some(dry.clone()), ..some() }),
        ("mirostat", SamplingParams { mirostat: Some(mirostat), ..some() }),
        ("repetition", SamplingParams { repetition_penalty: 1.7, ..some() }),
        ("frequency", SamplingParams { frequency_penalty: 0.4, ..some() }),
        ("presence", SamplingParams { presence_penalty: -0.8, ..some() }),
        ("bias", SamplingParams { logit_bias: vec![(7, 2.0), (2, -1.0), (7, 0.5)], ..some() }),
        ("allowed", SamplingParams { allowed_tokens: Some(vec![1, 4, 9, 11]), ..some() }),
        ("banned", SamplingParams { banned_tokens: vec![2, 8, 2], ..some() }),
        ("minimum", SamplingParams { min_tokens: 10, stop_tokens: vec![2, 4], top_k: 4, ..some() }),
        ("past the minimum", SamplingParams { min_tokens: 9, stop_tokens: vec![2, 4], ..some() }),
        (
            "the usual",
            SamplingParams { temperature: 1.6, top_k: 9, top_p: 0.85, min_p: 0.4, ..some() },
        ),
        (
            "filters before temperature",
            SamplingParams {
                temperature: 2.0,
                top_k: 8,
                top_p: 0.8,
                chain: vec![Step::TopP, Step::TopK, Step::Temperature],
                ..some()
            },
        ),
        (
            "temperature before penalties",
            SamplingParams {
                temperature: 0.7,
                repetition_penalty: 1.7,
                presence_penalty: 0.3,
                top_p: 0.9,
                chain: vec![Step::Temperature, Step::Penalties, Step::TopP],
                ..some()
            },
        ),
        (
            "everything",
            SamplingParams {
                temperature: 1.3,
                top_k: 11,
                top_p: 0.97,
                min_p: 0.1,
                typical_p: 0.95,
                top_n_sigma: Some(2.0),
                xtc: Some(xtc(0.5)),
                dry: Some(dry),
                mirostat: Some(mirostat),
                repetition_penalty: 1.2,
                frequency_penalty: 0.1,
                presence_penalty: 0.1,
                logit_bias: vec![(1, 1.0)],
                banned_tokens: vec![3],
                ..some()
            },
        ),
    ]
}

#[test]
fn every_sampler_and_chains_draw_as_documented() {
    let logits = LOGITS.map(f64::from);
    for (what, params) in cases() {
        let expected = probabilities(&logits, &params, &text());
        let batch = batch(&vec![(params, text()); ROWS], LOGITS.len());
        let drawn = (0..DRAWS / ROWS).flat_map(|round| {
            let positions = positions_from(round * ROWS, ROWS);
            tokens(&batch.sample(rows_of(&LOGITS, ROWS), positions).unwrap())
        });
        assert_follow(what, &drawn.collect::<Vec<_>>(), &expected);
    }
}

/// A case that any distribution would pass shows nothing.
#[test]
fn every_case_of_these_differs_from_what_no_sampler_draws() {
    let plain = probabilities(&LOGITS.map(f64::from), &some(), &text());
    for (what, params) in cases().into_iter().filter(|(what, _)| *what != "nothing") {
        let expected = probabilities(&LOGITS.map(f64::from), &params, &text());
        let apart: f64 = plain.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum();
        let does_something = what != "past the minimum";
        assert_eq!(apart > 0.05, does_something, "{what}: {apart}");
    }
}

#[test]
fn seeds_at_one_position_draw_freely() {
    let request = |seed| (SamplingParams { seed, ..Default::default() }, Text::default());
    let requests: Vec<_> = (0..DRAWS as u64).map(request).collect();
    let zero = broadcast_to(mlx_rs::Array::from_int(0), &[DRAWS as i32]).unwrap();
    let flat = [0.0; 4];
    let drawn = tokens(&batch(&requests, 4).sample(rows_of(&flat, DRAWS), zero).unwrap());
    assert_follow("seeds", &drawn, &[0.25; 4]);
    let pairs: Vec<_> = drawn.chunks(2).map(|pair| 4 * pair[0] + pair[1]).collect();
    assert_follow("neighbouring seeds", &pairs, &[1.0 / 16.0; 16]);
}

#[test]
fn positions_of_one_seed_draw_freely() {
    let requests = vec![(some(), Text::default()); DRAWS];
    let positions = positions_from(0, DRAWS);
    let drawn = tokens(&batch(&requests, 4).sample(rows_of(&[0.0; 4], DRAWS), positions).unwrap());
    for distance in [1, 2, 256] {
        let pairs = drawn.chunks(2 * distance).flat_map(|chunk| {
            let (first, second) = chunk.split_at(distance.min(chunk.len()));
            first.iter().zip(second).map(|(a, b)| 4 * a + b).collect::<Vec<_>>()
        });
        let what = format!("{distance} apart");
        assert_follow(&what, &pairs.collect::<Vec<_>>(), &[1.0 / 16.0; 16]);
    }
}
