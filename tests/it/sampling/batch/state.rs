//! What goes on from token to token.

use mlx_primitives::sampling::{Dry, Mirostat, Sampled, SamplerBatch, SamplingParams, Step};
use mlx_rs::Array;

use super::{LOGITS, Text, batch, history, oracle::probabilities, positions_from, rows_of, tokens};
use crate::{sampling::softmax, support::sample::Random};

const STEPS: usize = 40;

/// Logits of each step: the usual ones, turned, so that no token stays the best.
fn logits(step: usize) -> Vec<f32> {
    let mut row = LOGITS.to_vec();
    row.rotate_right(step % 5);
    row
}

fn penalized() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        repetition_penalty: 1.3,
        frequency_penalty: 0.2,
        presence_penalty: 0.1,
        dry: Some(Dry { multiplier: 1.5, range: 7, breakers: vec![9], ..Default::default() }),
        ..Default::default()
    }
}

fn text() -> Text {
    Text { prompt: vec![2, 8, 4, 2, 8], ..Default::default() }
}

fn sample(batch: &SamplerBatch, step: usize, rows: usize) -> Sampled {
    let positions = Array::from_slice(&vec![step as i32; rows], &[rows as i32]);
    batch.sample(rows_of(&logits(step), rows), positions).unwrap()
}

/// Draws without looking at a token before all are asked for.
fn run_ahead(mut batch: SamplerBatch, rows: usize) -> Vec<Vec<u32>> {
    let steps = (0..STEPS).map(|step| {
        let sampled = sample(&batch, step, rows);
        batch.advance(&sampled).unwrap();
        sampled
    });
    let steps: Vec<_> = steps.collect();
    steps.iter().map(tokens).collect()
}

#[test]
fn penalties_follow_the_text_as_it_grows() {
    let drawn = run_ahead(batch(&[(penalized(), text())], LOGITS.len()), 1);
    let mut so_far = text();
    for (step, token) in drawn.iter().map(|row| row[0]).enumerate() {
        let row: Vec<_> = logits(step).into_iter().map(f64::from).collect();
        let expected = probabilities(&row, &penalized(), &so_far);
        assert_eq!(expected[token as usize], 1.0, "step {step}");
        so_far.output.push(token);
    }
    let distinct: std::collections::HashSet<_> = drawn.iter().map(|row| row[0]).collect();
    assert!(distinct.len() > 4, "{drawn:?}");
}

#[test]
fn a_history_from_the_host_goes_on_like_one_that_grew() {
    let params = SamplingParams { temperature: 0.9, seed: 3, min_tokens: 30, ..penalized() };
    let params = SamplingParams { stop_tokens: vec![2, 8], ..params };
    let drawn = run_ahead(batch(&[(params.clone(), text())], LOGITS.len()), 1);
    let mut grown = history(&params, LOGITS.len(), &text());
    for known in 0..36 {
        let output = drawn[..known].iter().map(|row| row[0]).collect();
        let resumed = batch(&[(params.clone(), Text { output, ..text() })], LOGITS.len());
        assert_eq!(tokens(&sample(&resumed, known, 1)), drawn[known], "after {known}");
        let requests = vec![(params.clone(), grown.clone())];
        let pushed = SamplerBatch::new(requests, LOGITS.len() as i32, Default::default()).unwrap();
        assert_eq!(tokens(&sample(&pushed, known, 1)), drawn[known], "{known} told one by one");
        grown = grown.push(&params, drawn[known][0]).unwrap();
    }
    let early = drawn[..30].iter().all(|row| ![2, 8].contains(&row[0]));
    assert!(early, "a stop token came before the minimum: {drawn:?}");
    assert!(drawn[30..].iter().any(|row| [2, 8].contains(&row[0])), "{drawn:?}");
}

/// Requests of every kind: most of the plain one, some with histories.
fn requests() -> Vec<(SamplingParams, Text)> {
    let mut random = Random::new(9);
    let request = |seed: u64| {
        let plain = SamplingParams { seed, ..Default::default() };
        let params = match random.below(8) {
            0 => SamplingParams { temperature: 0.0, ..plain },
            1 => {
                let temperature = [0.8, 1.0, 0.0][random.below(3)];
                SamplingParams { seed, temperature, ..penalized() }
            }
            2 => SamplingParams { mirostat: Some(Mirostat { tau: 2.0, eta: 0.3 }), ..plain },
            3 => SamplingParams { typical_p: 0.7, banned_tokens: vec![2], ..plain },
            4 => SamplingParams { top_p: 0.7, min_p: 0.1, ..plain },
            5 => SamplingParams { top_k: 3, temperature: 1.7, ..plain },
            6 => SamplingParams { top_n_sigma: Some(1.2), top_p: 0.8, ..plain },
            _ => plain,
        };
        (params, text())
    };
    (0..32).map(request).collect()
}

#[test]
fn a_request_draws_the_same_alone_and_in_company() {
    let mut odd = Step::ALL.to_vec();
    odd.rotate_left(3);
    assert_eq!(odd[0], Step::Temperature);
    for chain in [Step::ALL.to_vec(), odd] {
        same_in_company(
            &requests()
                .into_iter()
                .map(|(params, text)| (SamplingParams { chain: chain.clone(), ..params }, text))
                .collect::<Vec<_>>(),
        );
    }
}

fn same_in_company(requests: &[(SamplingParams, Text)]) {
    let together = run_ahead(batch(requests, LOGITS.len()), requests.len());
    for (row, request) in requests.iter().enumerate() {
        let alone = run_ahead(batch(std::slice::from_ref(request), LOGITS.len()), 1);
        let alone: Vec<_> = alone.into_iter().map(|tokens| tokens[0]).collect();
        let company: Vec<_> = together.iter().map(|tokens| tokens[row]).collect();
        assert_eq!(alone, company, "row {row}: {:?}", request.0);
    }
}

#[test]
fn a_penalty_after_the_temperature_is_that_of_the_logit_itself() {
    let chain = vec![Step::Temperature, Step::Penalties];
    let greedy = |temperature| {
        let penalty = SamplingParams { repetition_penalty: 1.5, temperature, ..Default::default() };
        let params = SamplingParams { chain: chain.clone(), top_k: 0, ..penalty };
        (params, Text { prompt: vec![0], ..Default::default() })
    };
    // 1.2 / 1.5 is less than 1, though the best of all is 0 once it is taken off.
    let logits = [1.2, 1.0, -3.0, -3.0];
    for requests in [vec![greedy(0.0)], vec![greedy(0.0), greedy(0.01)]] {
        let batch = batch(&requests, logits.len());
        let positions = positions_from(0, requests.len());
        let drawn = tokens(&batch.sample(rows_of(&logits, requests.len()), positions).unwrap());
        assert_eq!(drawn, vec![1; requests.len()]);
    }
}

#[test]
fn histories_move_from_batch_to_batch() {
    let requests = requests();
    let expected = run_ahead(batch(&requests, LOGITS.len()), requests.len());
    let vocabulary = LOGITS.len() as i32;
    let mut running = batch(&requests, LOGITS.len());
    let mut order: Vec<_> = (0..requests.len()).collect();
    for (step, expected) in expected.iter().enumerate() {
        let sampled = sample(&running, step, order.len());
        let found = tokens(&sampled);
        let places = order.iter().map(|&row| expected[row]);
        assert_eq!(found, places.collect::<Vec<_>>(), "step {step}");
        running.advance(&sampled).unwrap();
        if step % 3 == 2 {
            // One leaves, and the rest turn.
            let histories = running.into_histories().unwrap();
            assert!(histories.iter().all(|history| history.generated() == step as u32 + 1));
            let mut kept: Vec<_> = order.iter().copied().zip(histories).skip(1).collect();
            kept.rotate_left(2);
            order = kept.iter().map(|(row, _)| *row).collect();
            let kept = kept.into_iter().map(|(row, history)| (requests[row].0.clone(), history));
            running = SamplerBatch::new(kept.collect(), vocabulary, Default::default()).unwrap();
        }
    }
}

#[test]
fn mirostat_holds_the_surprise_and_keeps_to_its_bound() {
    let mirostat = Mirostat { tau: 2.0, eta: 0.4 };
    let params = SamplingParams { mirostat: Some(mirostat), seed: 5, ..Default::default() };
    let drawn = run_ahead(batch(&[(params, text())], LOGITS.len()), 1);
    let mut bound = 2.0 * f64::from(mirostat.tau);
    let mut surprises = Vec::new();
    for (step, token) in drawn.iter().map(|row| row[0] as usize).enumerate() {
        let row: Vec<_> = logits(step).into_iter().map(f64::from).collect();
        let p = softmax(&row);
        let best = p.iter().copied().fold(0.0, f64::max);
        let surprise = -p[token].log2();
        assert!(surprise <= bound + 1e-3 || p[token] == best, "step {step}: {surprise} > {bound}");
        bound -= f64::from(mirostat.eta) * (surprise - f64::from(mirostat.tau));
        surprises.push(surprise);
    }
    // Over many steps the mean is that of the bound's way over eta, however each token fell.
    let mean = surprises.iter().sum::<f64>() / surprises.len() as f64;
    assert!((mean - 2.0).abs() < 0.5, "{mean}");
    let plain = run_ahead(
        batch(&[(SamplingParams { seed: 5, ..Default::default() }, text())], LOGITS.len()),
        1,
    );
    assert_ne!(plain, drawn);
}

#[test]
fn a_failed_step_changes_nothing() {
    let requests = [(SamplingParams { temperature: 0.9, ..penalized() }, text())];
    let expected = run_ahead(batch(&requests, LOGITS.len()), 1);
    let mut running = batch(&requests, LOGITS.len());
    let two = batch(&[requests[0].clone(), requests[0].clone()], LOGITS.len());
    for (step, expected) in expected.iter().enumerate() {
        assert!(running.sample(Array::from_f32(0.0), positions_from(step, 1)).is_err());
        assert!(running.advance(&sample(&two, step, 2)).is_err());
        let sampled = sample(&running, step, 1);
        assert_eq!(&tokens(&sampled), expected, "step {step}");
        running.advance(&sampled).unwrap();
    }
}
