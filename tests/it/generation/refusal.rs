//! Requests that no engine takes, and engines that cannot be.

use mlx_primitives::{
    generation::{GenerationEngine, GenerationEngineOptions, GenerationRequest},
    sampling::SamplingParams,
};

use super::{Decoder, cache_bytes, engine, options, params, prompt, request, speculation::Chain};

#[test]
fn bad_requests_are_refused_before_anything_happens() {
    let engine = engine(GenerationEngineOptions { cache_bytes: cache_bytes(64), ..options() });
    let good = || request(prompt(1, 4), 4, params(1, 1.0));
    let with = |sampling| GenerationRequest { sampling, ..good() };
    let cases = [
        (
            GenerationRequest { prompt: vec![], ..good() },
            "[GenerationRequest] prompt must have a token but got none",
        ),
        (
            GenerationRequest { prompt: vec![1, 61], ..good() },
            "[GenerationRequest] prompt must hold ids below 61 but got 61",
        ),
        (
            GenerationRequest { max_tokens: 0, ..good() },
            "[GenerationRequest] max_tokens must be at least 1 but got 0",
        ),
        (
            GenerationRequest { stop_strings: vec!["a".into(), String::new()], ..good() },
            "[GenerationRequest] stop_strings must be of one character or more but got \"\"",
        ),
        (with(SamplingParams { top_p: 0.0, ..params(1, 1.0) }), "top_p"),
        (with(SamplingParams { top_p: f32::NAN, ..params(1, 1.0) }), "top_p"),
        (with(SamplingParams { temperature: f32::NAN, ..params(1, 1.0) }), "temperature"),
        (with(SamplingParams { stop_tokens: vec![61], ..params(1, 1.0) }), "stop_tokens"),
        (
            GenerationRequest { top_log_probabilities: 21, ..good() },
            "[GenerationRequest] top_log_probabilities must be from 0 to 20 but got 21",
        ),
        (
            GenerationRequest { n: 33, ..good() },
            "[GenerationEngine] n must be at most 32 but got 33",
        ),
        (
            GenerationRequest { max_tokens: 61, ..good() },
            "[GenerationEngine] request must need at most 4 blocks of 16 tokens for prompt and max_tokens, which is what \
             fits into cache_bytes, but got 5",
        ),
        (
            GenerationRequest { n: 5, ..good() },
            "[GenerationEngine] request must need at most 4 blocks",
        ),
    ];
    for (request, expected) in cases {
        let error = engine.submit(request.clone()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} for {request:?}");
    }
    // A prompt that fills the cache, but for one token, is read in chunks.
    let longest = request(prompt(1, 63), 1, params(1, 1.0));
    assert_eq!(engine.generate(longest).unwrap()[0].tokens.len(), 1);
    assert_eq!(engine.stats().finished, 1);
}

#[test]
fn no_more_tokens_are_reported_than_there_are() {
    let engine = GenerationEngine::new(Chain::new(1, 0.0), options()).unwrap();
    let asked = |top| GenerationRequest {
        top_log_probabilities: top,
        ..request(vec![0], 2, params(1, 1.0))
    };
    assert_eq!(
        engine.submit(asked(6)).unwrap_err().to_string(),
        "[GenerationRequest] top_log_probabilities must be from 0 to 5 but got 6",
    );
    let text = engine.generate(asked(5)).unwrap().swap_remove(0);
    assert_eq!(text.tokens.len(), 2);
}

#[test]
fn no_more_texts_are_written_than_a_step_has_tokens_for() {
    let engine = engine(GenerationEngineOptions { max_batch_tokens: 3, ..options() });
    let texts = |n| GenerationRequest { n, ..request(prompt(1, 4), 9, params(1, 1.0)) };
    let refused = engine.submit(texts(4)).unwrap_err().to_string();
    assert_eq!(refused, "[GenerationEngine] n must be at most 3 but got 4");
    let streams = [3, 2, 3, 1].map(|n| engine.submit(texts(n)).unwrap());
    while engine.stats().finished < 4 {
        assert!(engine.stats().running <= 3);
    }
    for stream in streams {
        assert!(stream.completions().iter().all(|text| text.tokens.len() == 9));
    }
}

#[test]
fn strings_cannot_be_found_without_text() {
    let engine = engine(GenerationEngineOptions { detokenizer: None, ..options() });
    let stop_strings = vec!["stop".to_owned()];
    let asked = GenerationRequest { stop_strings, ..request(prompt(1, 4), 4, params(1, 1.0)) };
    assert_eq!(
        engine.submit(asked).unwrap_err().to_string(),
        "[GenerationRequest] stop_strings must be none without a detokenizer but got some",
    );
    let text = engine.generate(request(prompt(1, 4), 4, params(1, 1.0))).unwrap().swap_remove(0);
    assert_eq!((text.tokens.len(), text.text.as_str()), (4, ""));
}

#[test]
fn engines_without_room_are_refused() {
    let refused = |options| GenerationEngine::new(Decoder::new(), options).unwrap_err().to_string();
    let zero = |set: fn(&mut GenerationEngineOptions)| {
        let mut options = options();
        set(&mut options);
        refused(options)
    };
    assert_eq!(
        zero(|options| options.max_batch_size = 0),
        "[GenerationEngine] max_batch_size must be at least 1 but got 0",
    );
    assert_eq!(
        zero(|options| options.max_prompt_chunk = 0),
        "[GenerationEngine] max_prompt_chunk must be at least 1 but got 0",
    );
    assert!(zero(|options| options.max_batch_tokens = 0).contains("max_batch_tokens"));
    assert!(zero(|options| options.cache_bytes = 5000).contains("be room for 2 blocks"));
}
