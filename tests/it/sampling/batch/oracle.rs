//! What a request's next token is distributed like, in f64 and one token at a time.

use mlx_primitives::sampling::{Dry, SamplingParams, Step};

use crate::sampling::softmax;

const NONE: f64 = f64::NEG_INFINITY;

/// The text of a request so far, and the bound of its Mirostat.
#[derive(Clone, Default)]
pub(super) struct Text {
    pub(super) prompt: Vec<u32>,
    pub(super) output: Vec<u32>,
    pub(super) bound: f64,
}

/// The probability of each token, by the documentation of [`SamplingParams`].
pub(super) fn probabilities(logits: &[f64], params: &SamplingParams, text: &Text) -> Vec<f64> {
    mixture(logits.to_vec(), params, text, &params.chain)
}

fn mixture(row: Vec<f64>, params: &SamplingParams, text: &Text, chain: &[Step]) -> Vec<f64> {
    let Some((&step, rest)) = chain.split_first() else {
        return if params.temperature == 0.0 { certain(&row) } else { softmax(&row) };
    };
    let adjusts = matches!(step, Step::Penalties | Step::Dry | Step::Bias);
    if params.temperature == 0.0 && !adjusts {
        return mixture(row, params, text, rest);
    }
    if let (Step::Xtc, Some(xtc)) = (step, &params.xtc) {
        let p = f64::from(xtc.probability);
        let without = mixture(without_top_choices(&row, params), params, text, rest);
        let with = mixture(row, params, text, rest);
        return with.iter().zip(&without).map(|(a, b)| (1.0 - p) * a + p * b).collect();
    }
    mixture(stepped(&row, params, text, step), params, text, rest)
}

fn stepped(row: &[f64], params: &SamplingParams, text: &Text, step: Step) -> Vec<f64> {
    let p = softmax(row);
    match step {
        Step::Penalties => penalized(row, params, text),
        Step::Dry => match &params.dry {
            Some(dry) => without_repetition(row, dry, text),
            None => row.to_vec(),
        },
        Step::Bias => biased(row, params, text),
        Step::Temperature => row.iter().map(|v| v / f64::from(params.temperature)).collect(),
        Step::TopNSigma => match params.top_n_sigma {
            Some(sigmas) => within_sigmas(row, sigmas.into()),
            None => row.to_vec(),
        },
        Step::TopK if params.top_k == 0 => row.to_vec(),
        Step::TopK => ranked(row, |i| -row[i], |rank, _| rank < params.top_k as usize),
        Step::TopP if params.top_p == 1.0 => row.to_vec(),
        Step::TopP => ranked(row, |i| -p[i], |_, before| before < f64::from(params.top_p)),
        Step::MinP => {
            let best = p.iter().copied().fold(0.0, f64::max);
            filtered(row, |i| p[i] >= f64::from(params.min_p) * best)
        }
        Step::TypicalP if params.typical_p == 1.0 => row.to_vec(),
        Step::TypicalP => {
            let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let off = |i: usize| (-p[i].ln() - entropy).abs();
            ranked(row, off, |_, before| before < f64::from(params.typical_p))
        }
        Step::Mirostat if params.mirostat.is_none() => row.to_vec(),
        Step::Mirostat => ranked(row, |i| -p[i], |rank, _| rank == 0)
            .iter()
            .enumerate()
            .map(|(i, &best)| if -p[i].log2() <= text.bound { row[i] } else { best })
            .collect(),
        Step::Xtc => row.to_vec(),
        other => panic!("no oracle for {other:?}"),
    }
}

fn filtered(row: &[f64], keeps: impl Fn(usize) -> bool) -> Vec<f64> {
    (0..row.len()).map(|i| if keeps(i) { row[i] } else { NONE }).collect()
}

/// Keeps tokens in ascending order of `key`, the lowest id first, while `keeps` their rank and the
/// probability of those before; the first in any case.
fn ranked(row: &[f64], key: impl Fn(usize) -> f64, keeps: impl Fn(usize, f64) -> bool) -> Vec<f64> {
    let p = softmax(row);
    let mut order: Vec<_> = (0..row.len()).collect();
    order.sort_by(|&a, &b| key(a).total_cmp(&key(b)));
    let (mut kept, mut before) = (vec![false; row.len()], 0.0);
    for (rank, token) in order.into_iter().enumerate() {
        kept[token] = rank == 0 || keeps(rank, before);
        before += p[token];
    }
    filtered(row, |i| kept[i])
}

fn certain(row: &[f64]) -> Vec<f64> {
    let best = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    (0..row.len()).map(|i| if i == best { 1.0 } else { 0.0 }).collect()
}

fn penalized(row: &[f64], params: &SamplingParams, text: &Text) -> Vec<f64> {
    let penalty = |(token, &logit): (usize, &f64)| {
        let count = |tokens: &[u32]| tokens.iter().filter(|&&t| t as usize == token).count();
        let (prompt, output) = (count(&text.prompt), count(&text.output));
        let repetition =
            if prompt + output > 0 { f64::from(params.repetition_penalty) } else { 1.0 };
        let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
        let presence = if output > 0 { f64::from(params.presence_penalty) } else { 0.0 };
        logit - f64::from(params.frequency_penalty) * output as f64 - presence
    };
    row.iter().enumerate().map(penalty).collect()
}

fn without_repetition(row: &[f64], dry: &Dry, text: &Text) -> Vec<f64> {
    let all: Vec<_> = text.prompt.iter().chain(&text.output).copied().collect();
    let text = &all[all.len().saturating_sub(dry.range as usize)..];
    let breaks = |token: &u32| dry.breakers.contains(token);
    let mut row_after = row.to_vec();
    for token in 0..row.len() as u32 {
        let places = (1..text.len()).filter(|&place| text[place] == token && !breaks(&token));
        let length = |place: usize| {
            let same = |&n: &usize| n <= place && text[place - n..place] == text[text.len() - n..];
            (1..text.len())
                .filter(same)
                .filter(|n| !text[place - n..place].iter().any(breaks))
                .max()
        };
        let longest = places.filter_map(length).max().unwrap_or(0);
        if longest >= dry.allowed_length as usize {
            let beyond = (longest - dry.allowed_length as usize) as i32;
            row_after[token as usize] -=
                f64::from(dry.multiplier) * f64::from(dry.base).powi(beyond);
        }
    }
    row_after
}

fn biased(row: &[f64], params: &SamplingParams, text: &Text) -> Vec<f64> {
    let early = text.output.len() < params.min_tokens as usize;
    let bias = |(token, &logit): (usize, &f64)| {
        let token = token as u32;
        let allowed = params.allowed_tokens.as_ref().is_none_or(|ids| ids.contains(&token));
        let stop = early && params.stop_tokens.contains(&token);
        if !allowed || stop || params.banned_tokens.contains(&token) {
            return NONE;
        }
        let added = params.logit_bias.iter().filter(|(id, _)| *id == token);
        logit + added.map(|(_, bias)| f64::from(*bias)).sum::<f64>()
    };
    row.iter().enumerate().map(bias).collect()
}

fn within_sigmas(row: &[f64], sigmas: f64) -> Vec<f64> {
    let finite: Vec<_> = row.iter().copied().filter(|v| v.is_finite()).collect();
    let mean = finite.iter().sum::<f64>() / finite.len() as f64;
    let variance = finite.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / finite.len() as f64;
    let best = finite.iter().copied().fold(NONE, f64::max);
    filtered(row, |i| row[i] >= best - sigmas * variance.sqrt())
}

fn without_top_choices(row: &[f64], params: &SamplingParams) -> Vec<f64> {
    let Some(xtc) = &params.xtc else { return row.to_vec() };
    let p = softmax(row);
    let likely = |i: usize| p[i] > 0.0 && p[i] >= f64::from(xtc.threshold);
    let least = (0..row.len()).filter(|&i| likely(i)).map(|i| p[i]).fold(f64::INFINITY, f64::min);
    let goes = |i: usize| likely(i) && p[i] > least && !xtc.protected.contains(&(i as u32));
    filtered(row, |i| !goes(i))
}
