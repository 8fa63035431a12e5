//! Whole rows at once, on every backend: which tokens, and how likely they are.

use mlx_primitives::sampling::{LogProbabilities, SamplerBatchOptions, SamplingParams};
use mlx_rs::{Array, Dtype, ops::concatenate};

use super::{Text, batch_on, oracle::probabilities, positions_from, tokens};
use crate::{
    sampling::softmax,
    support::{
        backends::{on_backends, with_kernels},
        compare::{Tolerance, assert_close},
        sample::Random,
        tensor::Tensor,
    },
};

const OP: &str = "SamplerBatch";
const NONE: f32 = f32::NEG_INFINITY;

/// Parameters that differ from row to row.
fn requests(vocabulary: usize) -> Vec<SamplingParams> {
    let k = |k: usize| k.clamp(1, vocabulary) as i32;
    let plain = SamplingParams::default();
    let usual = SamplingParams { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.02, ..plain };
    let mut requests = vec![
        SamplingParams::default(),
        SamplingParams { temperature: 0.0, ..Default::default() },
        SamplingParams { temperature: 0.3, ..Default::default() },
        SamplingParams { temperature: 1e-30, ..Default::default() },
        SamplingParams { top_k: 1, ..Default::default() },
        SamplingParams { top_k: 5, temperature: 2.0, ..Default::default() },
        SamplingParams { top_k: k(vocabulary / 3), ..Default::default() },
        SamplingParams { top_k: k(vocabulary - 1), ..Default::default() },
        SamplingParams { top_p: 1e-6, ..Default::default() },
        SamplingParams { top_p: 0.5, ..Default::default() },
        SamplingParams { top_p: 0.95, temperature: 1.5, ..Default::default() },
        SamplingParams { top_p: 0.9999, ..Default::default() },
        SamplingParams { min_p: 0.05, ..Default::default() },
        SamplingParams { min_p: 1.0, ..Default::default() },
        SamplingParams { top_k: k(vocabulary / 2), top_p: 0.6, ..Default::default() },
        usual,
    ];
    (0..).zip(&mut requests).for_each(|(seed, request)| request.seed = seed);
    // A sanitizer takes its time over long rows.
    let every = if vocabulary > 10_000 { 4 } else { 1 };
    requests.into_iter().skip(every - 1).step_by(every).collect()
}

/// Logits of as many rows as there are requests.
fn logits(kind: &str, vocabulary: usize, dtype: Dtype) -> Array {
    let mut random = Random::new(3);
    let rows = requests(vocabulary).len();
    let mut value = |kind: &str| match kind {
        "flat" => random.normal() as f32,
        // So close that most are in one bin of a histogram.
        "crowded" => [4.0, 1.0, 1.0, 1.0, 1.0][random.below(5)] + 1e-4 * random.normal() as f32,
        "peaked" => 3.0 * random.normal() as f32,
        "tied" => random.below(3) as f32,
        "equal" => 0.25,
        "holes" => [NONE, f32::NAN, 1.0, 0.5, 2.0][random.below(5)],
        other => panic!("no logits are {other}"),
    };
    // In turn, for one call that takes every way through the kernel.
    let kind_of = |row: usize| match kind {
        "mixed" => ["crowded", "equal", "flat"][row % 3],
        kind => kind,
    };
    let values: Vec<_> = (0..rows * vocabulary).map(|i| value(kind_of(i / vocabulary))).collect();
    Array::from_slice(&values, &[rows as i32, vocabulary as i32]).as_dtype(dtype).unwrap()
}

fn options(log_probabilities: LogProbabilities) -> SamplerBatchOptions {
    SamplerBatchOptions { log_probabilities, ..Default::default() }
}

/// Every backend draws what the reference draws, and says how likely that was.
fn assert_drawn(kind: &str, vocabulary: usize, dtype: Dtype, report: LogProbabilities) {
    let requests: Vec<_> =
        requests(vocabulary).into_iter().map(|params| (params, Text::default())).collect();
    let x = logits(kind, vocabulary, dtype);
    let rows = requests.len() as i32;
    let positions = Array::from_slice(&(100..100 + rows).collect::<Vec<_>>(), &[rows]);
    let reference = batch_on(&requests, vocabulary, options(report)).unwrap();
    let expected = tokens(&reference.sample(&x, &positions).unwrap());
    let all = Tensor::of(&x);
    let likely = all.rows().zip(&requests).zip(&expected).map(|((row, request), &token)| {
        let row: Vec<_> =
            row.iter().map(|&v| if v.is_nan() { f64::from(NONE) } else { v }).collect();
        match report {
            LogProbabilities::Processed if row.iter().all(|&v| v == f64::from(NONE)) => {
                f64::from(NONE)
            }
            LogProbabilities::Processed => {
                probabilities(&row, &request.0, &request.1)[token as usize].ln()
            }
            _ => softmax(&row)[token as usize].ln(),
        }
    });
    let likely = Tensor::new(&[requests.len()], likely.collect());
    on_backends(
        with_kernels(true),
        OP,
        |dispatch| {
            let options = SamplerBatchOptions { dispatch, ..options(report) };
            batch_on(&requests, vocabulary, options)?.sample(&x, &positions)
        },
        |backend, sampled| {
            let what = format!("{OP} {kind} {vocabulary} {dtype:?} {report:?} on {backend}");
            assert_eq!(tokens(&sampled), expected, "{what}");
            let shows = kind == "holes";
            let found = &sampled.log_probabilities;
            if shows && vocabulary > 30 {
                assert!(Tensor::of(found).values.iter().all(|v| v.is_nan()), "{what}");
            } else if !shows {
                assert_close(&what, found, &likely, Tolerance::of(OP, Dtype::Float32));
            }
        },
    );
}

/// The first calls of a kernel go through every build. After them, each kind has one dtype in turn.
#[test]
fn every_backend_draws_the_same_and_says_how_likely_it_was() {
    let variants = [
        (Dtype::Float32, LogProbabilities::Raw),
        (Dtype::Float16, LogProbabilities::Processed),
        (Dtype::Bfloat16, LogProbabilities::Raw),
    ];
    for (dtype, report) in variants {
        assert_drawn("mixed", 2500, dtype, report);
    }
    for (turn, kind) in ["flat", "peaked", "tied", "equal", "holes"].into_iter().enumerate() {
        for (size, vocabulary) in [7, 1, 1000].into_iter().enumerate() {
            let (dtype, report) = variants[(turn + size) % 3];
            assert_drawn(kind, vocabulary, dtype, report);
        }
    }
    for kind in ["flat", "equal"] {
        assert_drawn(kind, 128_256, Dtype::Float32, LogProbabilities::Raw);
    }
}

/// Where every row keeps a few tokens, no more of it is ordered; a row that keeps all changes that.
#[test]
fn what_is_ordered_of_a_row_changes_nothing() {
    let few = |seed: u64| SamplingParams {
        seed,
        top_k: 1 + (seed % 6) as i32,
        top_p: [1.0, 0.7, 0.3][seed as usize % 3],
        min_p: [0.0, 0.4][seed as usize % 2],
        temperature: [1.0, 0.0, 3.0, 0.5][seed as usize % 4],
        ..Default::default()
    };
    let mut requests: Vec<_> = (0..48).map(|seed| (few(seed), Text::default())).collect();
    for kind in ["flat", "tied", "equal", "holes"] {
        let x = logits(kind, 33, Dtype::Float32);
        let x =
            concatenate(&[&x, &x, &x, &x.take_axis(Array::from_slice(&[0], &[1]), 0).unwrap()], 0);
        let x = x.unwrap();
        let draw = |requests: &[(SamplingParams, Text)]| {
            let rows = requests.len() as i32;
            let options = options(LogProbabilities::Processed);
            let x = x.take_axis(Array::arange::<_, i32>(0, rows, None).unwrap(), 0).unwrap();
            let batch = batch_on(requests, 33, options).unwrap();
            let sampled = batch.sample(&x, positions_from(5, requests.len())).unwrap();
            let bits = |likely: &f64| (!likely.is_nan()).then_some(likely.to_bits());
            let likely = Tensor::of(&sampled.log_probabilities).values;
            (tokens(&sampled), likely.iter().map(bits).collect::<Vec<_>>())
        };
        let (few, likely) = draw(&requests);
        requests.push((SamplingParams::default(), Text::default()));
        let (all, likely_beside) = draw(&requests);
        requests.pop();
        assert_eq!(few, all[..48], "{kind}");
        assert_eq!(likely, likely_beside[..48], "{kind}");
    }
}
