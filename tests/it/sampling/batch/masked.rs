//! Rows that may draw some tokens only, beside rows that may draw any.

use mlx_primitives::{
    Result,
    sampling::{
        Conditions, LogProbabilities, Sampled, SamplerBatch, SamplerBatchOptions, SamplingParams,
        TokenMask,
    },
};
use mlx_rs::{Array, Dtype};

use super::{
    LOGITS, Text, batch, batch_on,
    draws::{cases, text},
    oracle::probabilities,
    positions_from, rows_of, tokens,
};
use crate::{
    sampling::{assert_follow, softmax},
    support::{
        compare::{Tolerance, assert_close},
        sample::{Random, normal},
        tensor::Tensor,
    },
};

const OP: &str = "SamplerBatch";
const OPEN: [u32; 7] = [0, 1, 4, 5, 8, 9, 11];

fn mask(vocabulary: usize, allowed: impl IntoIterator<Item = u32>) -> TokenMask {
    let mut mask = TokenMask::none(vocabulary as i32).unwrap();
    allowed.into_iter().for_each(|token| mask.allow(token));
    mask
}

/// The logits with −∞ wherever the mask of a row has no bit.
fn shut(logits: &Array, masks: &[Option<&TokenMask>]) -> Array {
    let all = Tensor::of(logits);
    let rows = all.rows().zip(masks).flat_map(|(row, mask)| {
        let open = |token: usize| mask.is_none_or(|mask| mask.allows(token as u32));
        let shut = move |(token, &value): (usize, &f64)| {
            if open(token) { value as f32 } else { f32::NEG_INFINITY }
        };
        row.iter().enumerate().map(shut).collect::<Vec<_>>()
    });
    let rows = rows.collect::<Vec<_>>();
    Array::from_slice(&rows, logits.shape()).as_dtype(logits.dtype()).unwrap()
}

fn bits(sampled: &Sampled) -> Vec<u32> {
    let likely = sampled.log_probabilities.as_dtype(Dtype::Float32).unwrap();
    likely.as_slice::<f32>().iter().map(|value| value.to_bits()).collect()
}

fn masked(
    batch: &SamplerBatch,
    x: &Array,
    positions: &Array,
    masks: &[Option<&TokenMask>],
) -> Result<Sampled> {
    batch.sample_under(x, positions, &Conditions { masks, ..Default::default() })
}

/// Every second request of every kind has a mask; those between have none.
fn mixed(vocabulary: usize) -> (Vec<(SamplingParams, Text)>, Vec<Option<TokenMask>>) {
    let small = |params: &SamplingParams| params.check(vocabulary as i32).is_ok();
    let cases = cases().into_iter().map(|(_, params)| params).filter(small).enumerate();
    let requests = cases.flat_map(|(seed, params)| {
        let params = SamplingParams { seed: seed as u64, ..params };
        [params.clone(), SamplingParams { seed: params.seed + 100, ..params }]
    });
    let requests = requests.map(|params| (params, text())).collect::<Vec<_>>();
    let mut random = Random::new(8);
    let masks = (0..requests.len()).map(|row| {
        let some = (0..vocabulary as u32).filter(|id| OPEN.contains(id) || random.below(3) == 0);
        let some = some.collect::<Vec<_>>();
        (row % 2 == 0).then(|| mask(vocabulary, some))
    });
    let masks = masks.collect();
    (requests, masks)
}

#[test]
fn a_mask_is_logits_of_minus_infinity_and_others_notice_nothing() {
    for (vocabulary, dtype) in [
        (12, Dtype::Float32),
        (31, Dtype::Float16),
        (32, Dtype::Bfloat16),
        (33, Dtype::Float32),
        (300, Dtype::Float16),
    ] {
        let (requests, masks) = mixed(vocabulary);
        let masks = masks.iter().map(Option::as_ref).collect::<Vec<_>>();
        let x = normal(vocabulary as u64, &[requests.len() as i32, vocabulary as i32], dtype);
        let positions = positions_from(7, requests.len());
        for report in [LogProbabilities::Raw, LogProbabilities::Processed] {
            let options = SamplerBatchOptions { log_probabilities: report, ..Default::default() };
            let batch = batch_on(&requests, vocabulary, options).unwrap();
            let free = batch.sample(&x, &positions).unwrap();
            let shut = batch.sample(shut(&x, &masks), &positions).unwrap();
            let masked = masked(&batch, &x, &positions, &masks).unwrap();
            let what = format!("{vocabulary} {dtype:?} {report:?}");
            assert_eq!(tokens(&masked), tokens(&shut), "{what}");
            let [free_bits, shut_bits, found] = [&free, &shut, &masked].map(bits);
            let (free, masked) = (tokens(&free), tokens(&masked));
            for (row, mask) in masks.iter().enumerate() {
                match mask {
                    None => assert_eq!(
                        (masked[row], found[row]),
                        (free[row], free_bits[row]),
                        "{what}: {row}"
                    ),
                    Some(mask) => {
                        assert!(mask.allows(masked[row]), "{what}: {row}");
                        let same = report == LogProbabilities::Raw || found[row] == shut_bits[row];
                        assert!(same, "{what}: {row}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_drawn_has_the_odds_of_the_model_among_what_is_open() {
    const DRAWS: usize = 200_000;
    const ROWS: usize = 2_000;
    let open = mask(LOGITS.len(), OPEN);
    let shut = |(token, value): (usize, &f32)| match OPEN.contains(&(token as u32)) {
        true => f64::from(*value),
        false => f64::NEG_INFINITY,
    };
    let logits = LOGITS.iter().enumerate().map(shut).collect::<Vec<_>>();
    let among = ["nothing", "temperature", "top-k", "everything"];
    for (what, params) in cases().into_iter().filter(|(what, _)| among.contains(what)) {
        let expected = match what {
            "nothing" => softmax(&logits),
            _ => probabilities(&logits, &params, &text()),
        };
        let batch = batch(&vec![(params, text()); ROWS], LOGITS.len());
        let drawn = (0..DRAWS / ROWS).flat_map(|round| {
            let (x, positions) = (rows_of(&LOGITS, ROWS), positions_from(round * ROWS, ROWS));
            tokens(&masked(&batch, &x, &positions, &vec![Some(&open); ROWS]).unwrap())
        });
        assert_follow(&format!("{what} of a mask"), &drawn.collect::<Vec<_>>(), &expected);
    }
}

#[test]
fn raw_log_probabilities_and_the_likeliest_tokens_stay_those_of_the_model() {
    let logits = LOGITS.map(f64::from);
    let (open, rows) = (mask(LOGITS.len(), OPEN), 6);
    let options = SamplerBatchOptions { top: 3, ..Default::default() };
    let all = softmax(&logits);
    let mut order = (0..LOGITS.len() as u32).collect::<Vec<_>>();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    for (what, params) in cases() {
        let requests = vec![(params, text()); rows];
        let batch = batch_on(&requests, LOGITS.len(), options).unwrap();
        let masks = [Some(&open), None].repeat(rows / 2);
        let (x, positions) = (rows_of(&LOGITS, rows), positions_from(0, rows));
        let sampled = masked(&batch, &x, &positions, &masks).unwrap();
        let expected = tokens(&sampled).into_iter().map(|token| all[token as usize].ln());
        let expected = Tensor::new(&[rows], expected.collect());
        let found = &sampled.log_probabilities;
        assert_close(what, found, &expected, Tolerance::of(OP, Dtype::Float32));
        let top = sampled.top.unwrap().tokens.to_vec_cast::<u32>().unwrap();
        assert_eq!(top, order[..3].repeat(rows), "{what}");
    }
}

#[test]
fn a_mask_of_nothing_leaves_nothing_to_draw() {
    let requests = vec![(SamplingParams::default(), Text::default()); 2];
    let empty = mask(LOGITS.len(), []);
    let options = SamplerBatchOptions {
        log_probabilities: LogProbabilities::Processed,
        ..Default::default()
    };
    let batch = batch_on(&requests, LOGITS.len(), options).unwrap();
    let (x, positions) = (rows_of(&LOGITS, 2), positions_from(3, 2));
    let beside = tokens(&batch.sample(&x, &positions).unwrap());
    let sampled = masked(&batch, &x, &positions, &[Some(&empty), None]).unwrap();
    assert_eq!(tokens(&sampled), [0, beside[1]]);
    assert_eq!(sampled.log_probabilities.as_slice::<f32>()[0], f32::NEG_INFINITY);
}

#[test]
fn masks_are_one_a_row_and_of_this_vocabulary() {
    let requests = vec![(SamplingParams::default(), Text::default()); 2];
    let batch = batch(&requests, LOGITS.len());
    let refusal = |masks: &[Option<&TokenMask>]| {
        let (x, positions) = (rows_of(&LOGITS, 2), positions_from(0, 2));
        masked(&batch, &x, &positions, masks).unwrap_err().to_string()
    };
    let [right, wrong] = [12, 13].map(|vocabulary| mask(vocabulary, [1]));
    assert_eq!(refusal(&[Some(&right)]), "[SamplerBatch] masks must number 2 but got 1");
    let expected = "[SamplerBatch] masks must be of 12 tokens but got 13";
    assert_eq!(refusal(&[Some(&right), Some(&wrong)]), expected);
}
