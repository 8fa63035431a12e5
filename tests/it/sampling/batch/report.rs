//! Log-probabilities beside the tokens.

use mlx_primitives::sampling::{LogProbabilities, SamplerBatchOptions};
use mlx_rs::Dtype;

use super::{
    LOGITS, batch_on,
    draws::{cases, text},
    oracle::probabilities,
    positions_from, rows_of, tokens,
};
use crate::{
    sampling::softmax,
    support::{
        compare::{Tolerance, assert_close},
        tensor::Tensor,
    },
};

const OP: &str = "SamplerBatch";
const TOP: usize = 4;

/// The `TOP` largest, and of equal ones the first.
fn best(p: &[f64]) -> Vec<u32> {
    let mut order: Vec<_> = (0..p.len() as u32).collect();
    order.sort_by(|&a, &b| p[b as usize].total_cmp(&p[a as usize]));
    order.truncate(TOP);
    order
}

#[test]
fn they_are_of_the_logits_as_they_came_or_as_they_were_drawn_from() {
    let rows = 5;
    let logits = LOGITS.map(f64::from);
    // With a coin thrown, it is not known which of two distributions a row was drawn from.
    let certain = |params: &mlx_primitives::sampling::SamplingParams| params.xtc.is_none();
    for (what, params) in cases().into_iter().filter(|(_, params)| certain(params)) {
        for report in [LogProbabilities::Raw, LogProbabilities::Processed] {
            let options = SamplerBatchOptions {
                log_probabilities: report,
                top: TOP as i32,
                ..Default::default()
            };
            let batch = batch_on(&vec![(params.clone(), text()); rows], LOGITS.len(), options);
            let sampled = batch.unwrap().sample(rows_of(&LOGITS, rows), positions_from(0, rows));
            let sampled = sampled.unwrap();
            let p = match report {
                LogProbabilities::Raw => softmax(&logits),
                _ => probabilities(&logits, &params, &text()),
            };
            let of = |tokens: &[u32]| {
                let values = tokens.iter().map(|&token| p[token as usize].ln()).collect();
                Tensor::new(&[tokens.len()], values)
            };
            let what = format!("{what} {report:?}");
            let tolerance = Tolerance::of(OP, Dtype::Float32);
            assert_close(&what, &sampled.log_probabilities, &of(&tokens(&sampled)), tolerance);
            let top = sampled.top.unwrap();
            assert_eq!(top.tokens.shape(), [rows as i32, TOP as i32], "{what}");
            let found = top.tokens.to_vec_cast::<u32>().unwrap();
            // Greedy rows are certain of one token, and their other logits say how likely the rest is.
            if params.temperature > 0.0 || report == LogProbabilities::Raw {
                assert_eq!(found, best(&p).repeat(rows), "{what}");
                let values = top.log_probabilities.reshape(&[-1]).unwrap();
                assert_close(&what, &values, &of(&found), tolerance);
            }
        }
    }
}
