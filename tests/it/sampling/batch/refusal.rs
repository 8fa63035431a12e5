//! What is refused, and in which words.

use mlx_primitives::sampling::{
    Dry, Mirostat, SamplerBatch, SamplerBatchOptions, SamplingParams, Step, TokenHistory, Xtc,
};
use mlx_rs::{Array, Dtype};

use super::{Text, batch, batch_on, positions_from};
use crate::support::sample::normal;

const VOCABULARY: i32 = 10;

fn some() -> SamplingParams {
    SamplingParams::default()
}

fn refusal(params: &SamplingParams) -> String {
    let refused = params.check(VOCABULARY).unwrap_err().to_string();
    let history = TokenHistory::new(params, VOCABULARY, &[], &[]);
    assert_eq!(history.unwrap_err().to_string(), refused);
    refused
}

#[test]
fn numbers_outside_their_range_are_refused_by_name() {
    let bad = [f32::NAN, f32::INFINITY, -1.0];
    for bad in bad {
        let xtc =
            |probability, threshold| Some(Xtc { probability, threshold, ..Default::default() });
        let dry = |multiplier, base| Some(Dry { multiplier, base, ..Default::default() });
        let mirostat = |tau, eta| Some(Mirostat { tau, eta });
        let cases = [
            ("temperature", SamplingParams { temperature: bad, ..some() }),
            ("top_p", SamplingParams { top_p: bad, ..some() }),
            ("min_p", SamplingParams { min_p: bad, ..some() }),
            ("typical_p", SamplingParams { typical_p: bad, ..some() }),
            ("top_n_sigma", SamplingParams { top_n_sigma: Some(bad), ..some() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: bad, ..some() }),
            ("xtc.probability", SamplingParams { xtc: xtc(bad, 0.1), ..some() }),
            ("xtc.threshold", SamplingParams { xtc: xtc(0.1, bad), ..some() }),
            ("dry.multiplier", SamplingParams { dry: dry(bad, 2.0), ..some() }),
            ("dry.base", SamplingParams { dry: dry(1.0, bad), ..some() }),
            ("mirostat.tau", SamplingParams { mirostat: mirostat(bad, 0.1), ..some() }),
            ("mirostat.eta", SamplingParams { mirostat: mirostat(5.0, bad), ..some() }),
        ];
        for (name, params) in cases {
            let message = refusal(&params);
            let expected = format!("[SamplingParams] {name} must");
            assert!(message.starts_with(&expected), "{bad}: {message}");
        }
    }
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        assert!(
            refusal(&SamplingParams { frequency_penalty: bad, ..some() }).contains("frequency")
        );
        assert!(refusal(&SamplingParams { presence_penalty: bad, ..some() }).contains("presence"));
        let bias = SamplingParams { logit_bias: vec![(0, bad)], ..some() };
        assert!(refusal(&bias).contains("logit_bias must be finite"));
    }
    for zero in [
        SamplingParams { top_p: 0.0, ..some() },
        SamplingParams { typical_p: 0.0, ..some() },
        SamplingParams { repetition_penalty: 0.0, ..some() },
        SamplingParams { mirostat: Some(Mirostat { tau: 0.0, eta: 0.1 }), ..some() },
        SamplingParams { top_k: -1, ..some() },
        SamplingParams { dry: Some(Dry { range: 0, ..Default::default() }), ..some() },
        SamplingParams { dry: Some(Dry { allowed_length: 0, ..Default::default() }), ..some() },
    ] {
        refusal(&zero);
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_by_name() {
    let xtc = Xtc { protected: vec![10], ..Default::default() };
    let dry = Dry { breakers: vec![u32::MAX], ..Default::default() };
    let cases = [
        ("banned_tokens", SamplingParams { banned_tokens: vec![3, 10], ..some() }),
        ("stop_tokens", SamplingParams { stop_tokens: vec![10], ..some() }),
        ("allowed_tokens", SamplingParams { allowed_tokens: Some(vec![10]), ..some() }),
        ("logit_bias", SamplingParams { logit_bias: vec![(10, 1.0)], ..some() }),
        ("xtc.protected", SamplingParams { xtc: Some(xtc), ..some() }),
        ("dry.breakers", SamplingParams { dry: Some(dry), ..some() }),
    ];
    for (name, params) in cases {
        let expected = format!("[SamplingParams] {name} must hold ids below 10 but got ");
        assert!(refusal(&params).starts_with(&expected), "{name}");
    }
    let history = |prompt: &[u32], output: &[u32]| {
        TokenHistory::new(&some(), VOCABULARY, prompt, output).unwrap_err().to_string()
    };
    assert_eq!(history(&[1, 10], &[]), "[TokenHistory] prompt must hold ids below 10 but got 10");
    assert_eq!(history(&[], &[10]), "[TokenHistory] output must hold ids below 10 but got 10");
}

#[test]
fn a_request_that_leaves_nothing_to_draw_is_refused() {
    let expected = "[SamplingParams] banned_tokens must leave a token to draw but got all";
    let all: Vec<_> = (0..10).collect();
    for params in [
        SamplingParams { banned_tokens: all.clone(), ..some() },
        SamplingParams {
            stop_tokens: all[1..].to_vec(),
            banned_tokens: vec![0],
            min_tokens: 1,
            ..some()
        },
        SamplingParams { allowed_tokens: Some(vec![4]), banned_tokens: vec![4], ..some() },
    ] {
        assert_eq!(refusal(&params), expected);
    }
    let none = SamplingParams { allowed_tokens: Some(Vec::new()), ..some() };
    assert!(refusal(&none).contains("allowed_tokens must hold a token"));
    let repeated = SamplingParams { banned_tokens: vec![3; 20], ..some() };
    assert!(repeated.check(VOCABULARY).is_ok());
}

#[test]
fn a_chain_has_each_step_once_and_all_that_are_set() {
    let twice = SamplingParams { chain: vec![Step::TopK, Step::TopK], ..some() };
    assert_eq!(refusal(&twice), "[SamplingParams] chain must hold TopK once but got it twice");
    let lacking = SamplingParams { top_p: 0.5, chain: vec![Step::TopK], ..some() };
    assert_eq!(refusal(&lacking), "[SamplingParams] chain must hold TopP once but got none");
    let short = SamplingParams { top_k: 5, chain: vec![Step::TopK], ..some() };
    assert!(short.check(VOCABULARY).is_ok());
}

#[test]
fn a_batch_refuses_what_does_not_fit_together() {
    let history =
        |params: &SamplingParams| TokenHistory::new(params, VOCABULARY, &[], &[]).unwrap();
    let new = |requests, vocabulary, top| {
        let options = SamplerBatchOptions { top, ..Default::default() };
        SamplerBatch::new(requests, vocabulary, options).map(|_| ()).unwrap_err().to_string()
    };
    let penalized = SamplingParams { presence_penalty: 1.0, ..some() };
    for (params, history) in [
        (penalized.clone(), history(&some())),
        (some(), history(&penalized)),
        (some(), TokenHistory::new(&some(), VOCABULARY + 1, &[], &[]).unwrap()),
    ] {
        let message = new(vec![(params, history)], VOCABULARY, 0);
        assert!(message.starts_with("[SamplerBatch] history must be of these"), "{message}");
    }
    let bad = SamplingParams { top_p: f32::NAN, ..some() };
    assert!(new(vec![(bad, history(&some()))], VOCABULARY, 0).contains("[SamplingParams] top_p"));
    for vocabulary in [0, -1, (1 << 20) + 1] {
        assert!(new(Vec::new(), vocabulary, 0).contains("vocabulary must be from 1 to 2^20"));
    }
    for top in [-1, VOCABULARY + 1] {
        assert!(new(Vec::new(), VOCABULARY, top).contains("top must be from 0 to 10"));
    }
}

#[test]
fn a_step_refuses_arrays_of_other_shapes_and_types() {
    let batch = batch(&[(some(), Text::default()), (some(), Text::default())], 10);
    let call = |logits: &Array, positions: &Array| {
        batch.sample(logits, positions).unwrap_err().to_string()
    };
    let (logits, positions) = (normal(1, &[2, 10], Dtype::Float32), positions_from(0, 2));
    assert!(
        call(&normal(1, &[3, 10], Dtype::Float32), &positions).contains("must have shape [2, 10]")
    );
    assert!(
        call(&normal(1, &[2, 9], Dtype::Float32), &positions).contains("must have shape [2, 10]")
    );
    assert!(call(&Array::from_f32(0.0), &positions).contains("[SamplerBatch] logits"));
    let ints = Array::zeros::<i32>(&[2, 10]).unwrap();
    assert!(call(&ints, &positions).contains("logits must have dtype"));
    assert!(call(&logits, &positions_from(0, 3)).contains("positions must have shape [2]"));
    let floats = Array::zeros::<f32>(&[2]).unwrap();
    assert!(call(&logits, &floats).contains("positions must have dtype"));
}

#[test]
fn no_requests_draw_nothing() {
    let options = SamplerBatchOptions { top: 2, ..Default::default() };
    let mut batch = batch_on(&[], 10, options).unwrap();
    let none = Array::zeros::<f32>(&[0, 10]).unwrap();
    let sampled = batch.sample(none, positions_from(0, 0)).unwrap();
    assert_eq!((sampled.tokens.shape(), sampled.tokens.dtype()), (&[0][..], Dtype::Uint32));
    assert_eq!(sampled.log_probabilities.shape(), [0]);
    assert_eq!(sampled.top.as_ref().unwrap().tokens.shape(), [0, 2]);
    batch.advance(&sampled).unwrap();
    assert!(batch.into_histories().unwrap().is_empty());
}
