//! A text depends on its request alone.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use mlx_primitives::{
    generation::{
        FinishReason, GenerationEngine, GenerationEngineOptions, GenerationEvent, GenerationRequest,
    },
    sampling::SamplingParams,
};

use super::{
    Decoder, all_texts, cache_bytes, engine, options, params, prompt, request, trouble::changed,
};

/// Requests of many lengths and ways to draw.
pub(super) fn requests(count: u64) -> Vec<GenerationRequest> {
    let request = |number: u64| {
        let sampling = match number % 4 {
            0 => params(number, 0.0),
            1 => params(number, 1.0),
            2 => SamplingParams { top_p: 0.8, top_k: 20, ..params(number, 0.7) },
            _ => SamplingParams {
                repetition_penalty: 1.3,
                frequency_penalty: 0.2,
                ..params(number, 0.9)
            },
        };
        let length = [1, 5, 16, 17, 40, 70][number as usize % 6];
        request(prompt(number, length), 4 + number as usize % 9, sampling)
    };
    (0..count).map(request).collect()
}

pub(super) fn expected(requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    let mut decoder = Decoder::new();
    let write = |request: &GenerationRequest| {
        decoder.written(&request.prompt, request.max_tokens, &request.sampling)
    };
    requests.iter().map(write).collect()
}

fn tokens(options: GenerationEngineOptions, requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    together(&engine(options), requests)
}

/// What all requests get at once.
pub(super) fn together(engine: &GenerationEngine, requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    let texts = all_texts(engine, requests).into_iter().map(|mut texts| {
        let text = texts.swap_remove(0);
        assert_eq!(text.reason, FinishReason::Length);
        assert_eq!(text.tokens.len(), text.log_probabilities.len());
        text.tokens
    });
    texts.collect()
}

#[test]
fn alone_in_a_batch_in_chunks_and_after_waiting() {
    let requests = requests(32);
    let expected = expected(&requests);
    let mut alone = Vec::new();
    let one = engine(options());
    for request in &requests {
        let text = one.generate(request.clone()).unwrap().swap_remove(0);
        assert_eq!(text.reason, FinishReason::Length);
        alone.push(text.tokens);
    }
    assert_eq!(alone, expected, "alone");
    assert_eq!(tokens(options(), &requests), expected, "together");
    let in_turn = GenerationEngineOptions { run_ahead: Some(false), ..options() };
    assert_eq!(tokens(in_turn, &requests), expected, "a step after the other");
    let chunks = GenerationEngineOptions { max_batch_tokens: 24, max_prompt_chunk: 7, ..options() };
    assert_eq!(tokens(chunks, &requests), expected, "in chunks");
}

#[test]
fn after_giving_blocks_back() {
    // Texts that are let in while they are short, and grow.
    let requests = requests(12).into_iter().map(|request| {
        let prompt = request.prompt[..request.prompt.len().min(17)].to_vec();
        GenerationRequest { prompt, max_tokens: 40, ..request }
    });
    let requests = requests.collect::<Vec<_>>();
    for run_ahead in [false, true] {
        let cache_bytes = cache_bytes(160);
        let engine = engine(GenerationEngineOptions {
            cache_bytes,
            run_ahead: Some(run_ahead),
            ..options()
        });
        let texts = together(&engine, &requests);
        assert_eq!(texts, expected(&requests));
        let stats = engine.stats();
        assert!((1..=24).contains(&stats.preemptions), "{stats:?}");
        assert_eq!((stats.used_blocks, stats.finished), (0, 12), "{stats:?}");
        assert_eq!(stats.generated_tokens, texts.iter().map(Vec::len).sum::<usize>() as u64);
    }
}

#[test]
fn after_a_prompt_that_began_alike() {
    let shared = prompt(3, 50);
    let request = |tail: u32| request([&shared[..], &[tail]].concat(), 8, params(5, 1.0));
    let engine = engine(options());
    for tail in [1, 2, 1] {
        let request = request(tail);
        let text = engine.generate(request.clone()).unwrap().swap_remove(0);
        assert_eq!(text.tokens, expected(&[request])[0]);
    }
    // Three blocks each of two prompts.
    assert_eq!(engine.stats().shared_tokens, 2 * 48);
    assert_eq!(engine.stats().prompt_tokens, 51 + 3 + 3);
}

#[test]
fn several_texts_of_a_prompt_are_those_of_as_many_requests() {
    let prompt = prompt(9, 21);
    let four = GenerationRequest { n: 4, ..request(prompt.clone(), 12, params(7, 1.0)) };
    let engine = engine(options());
    let texts = engine.generate(four).unwrap();
    let texts = texts.into_iter().map(|text| text.tokens).collect::<Vec<_>>();
    let alone = (7..11).map(|seed| request(prompt.clone(), 12, params(seed, 1.0)));
    assert_eq!(texts, expected(&alone.collect::<Vec<_>>()));
    assert_eq!(engine.stats().prompt_tokens, 21, "the prompt is read once");
    assert!(texts[1..].iter().all(|text| *text != texts[0]), "{texts:?}");
}

#[test]
fn several_texts_of_prompts_give_blocks_back_and_go_on() {
    let requests = (0..5).map(|seed| GenerationRequest {
        n: 3,
        ..request(prompt(seed, 9 + seed as usize), 30, params(10 * seed, 1.0))
    });
    let requests = requests.collect::<Vec<_>>();
    let engine = engine(GenerationEngineOptions { cache_bytes: cache_bytes(160), ..options() });
    let streams = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
    for (stream, asked) in streams.collect::<Vec<_>>().into_iter().zip(&requests) {
        let texts = stream.completions().into_iter().map(|text| text.tokens).collect::<Vec<_>>();
        let alone = (asked.sampling.seed..).take(3).map(|seed| GenerationRequest {
            n: 1,
            sampling: params(seed, 1.0),
            ..asked.clone()
        });
        assert_eq!(texts, expected(&alone.collect::<Vec<_>>()));
    }
    let stats = engine.stats();
    assert!(stats.preemptions > 0 && stats.used_blocks == 0, "{stats:?}");
}

#[test]
fn a_stop_token_ends_a_text_and_is_no_part_of_it() {
    let request = request(prompt(2, 9), 12, params(1, 0.0));
    let whole = expected(std::slice::from_ref(&request)).swap_remove(0);
    let stop = whole[5];
    let end = whole.iter().position(|&token| token == stop).unwrap();
    let sampling = SamplingParams { stop_tokens: vec![stop], ..request.sampling.clone() };
    let stopped = GenerationRequest { sampling, ..request.clone() };
    for (run_ahead, in_vain) in [(false, 0), (true, 1)] {
        let steps = Arc::new(AtomicUsize::new(0));
        let counted = steps.clone();
        let counting = move |logits| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(logits)
        };
        let options = GenerationEngineOptions { run_ahead: Some(run_ahead), ..options() };
        let engine = changed(counting, options);
        let text = engine.generate(stopped.clone()).unwrap().swap_remove(0);
        let reason = FinishReason::StopToken(stop);
        assert_eq!((text.tokens.as_slice(), text.reason), (&whole[..end], reason));
        let text = engine.generate(request.clone()).unwrap().swap_remove(0);
        assert_eq!((text.tokens, text.reason), (whole.clone(), FinishReason::Length));
        // That a text ends by its length is known before.
        assert_eq!(steps.load(Ordering::Relaxed), end + 1 + in_vain + whole.len());
    }
}

#[test]
fn a_text_that_stops_changes_none_beside_it() {
    let alone = (20..26).map(|seed| request(prompt(6, 19), 14, params(seed, 1.0)));
    let alone = alone.collect::<Vec<_>>();
    let whole = expected(&alone);
    // What the second text has in its middle ends some, not all, of the others somewhere too.
    let stop = whole[1][6];
    let ended = |text: &[u32]| match text.iter().position(|&token| token == stop) {
        Some(end) => (text[..end].to_vec(), FinishReason::StopToken(stop)),
        None => (text.to_vec(), FinishReason::Length),
    };
    let expected = whole.iter().map(|text| ended(text)).collect::<Vec<_>>();
    let drawn = expected.iter().map(|(text, _)| (text.len() + 1).min(14)).sum::<usize>() as u64;
    let stops = expected.iter().filter(|(_, reason)| *reason != FinishReason::Length).count();
    assert!((1..6).contains(&stops), "{expected:?}");
    for run_ahead in [false, true] {
        let sampling = SamplingParams { stop_tokens: vec![stop], ..params(20, 1.0) };
        let six = GenerationRequest { n: 6, sampling, ..alone[0].clone() };
        let engine = engine(GenerationEngineOptions { run_ahead: Some(run_ahead), ..options() });
        let texts = engine.generate(six).unwrap().into_iter();
        assert_eq!(texts.map(|text| (text.tokens, text.reason)).collect::<Vec<_>>(), expected);
        let stats = engine.stats();
        assert_eq!((stats.generated_tokens, stats.used_blocks), (drawn, 0), "{stats:?}");
    }
}

#[test]
fn a_stop_string_ends_a_text_across_tokens() {
    let request = request(prompt(4, 9), 20, params(3, 1.0));
    let engine = engine(options());
    let whole = engine.generate(request.clone()).unwrap().swap_remove(0).text;
    let stop = whole[6..9].to_owned();
    let end = whole.find(&stop).unwrap();
    for include_stop_string in [false, true] {
        let stop_strings = vec!["never".to_owned(), stop.clone()];
        let request = GenerationRequest { stop_strings, include_stop_string, ..request.clone() };
        let events = engine.submit(request).unwrap().collect::<Vec<_>>();
        let mut text = String::new();
        for event in &events {
            match event {
                GenerationEvent::Token(token) => text.push_str(&token.text),
                GenerationEvent::Finish(finish) => {
                    assert_eq!(finish.reason, FinishReason::StopString(stop.clone()));
                    text.push_str(&finish.text);
                }
            }
            assert!(include_stop_string || whole[..end].starts_with(&text), "{text} of {whole}");
        }
        let shown = if include_stop_string { end + 3 } else { end };
        assert_eq!(text, whole[..shown]);
    }
}

#[test]
fn the_likeliest_tokens_are_told_of() {
    let request = request(prompt(4, 5), 40, params(0, 0.0));
    let asked = GenerationRequest { top_log_probabilities: 3, ..request.clone() };
    let engine = engine(options());
    // Another in the same steps asks for none.
    let other = engine.submit(request).unwrap();
    for event in engine.submit(asked).unwrap() {
        let GenerationEvent::Token(token) = event else { continue };
        assert_eq!(token.top.len(), 3);
        assert_eq!(token.top[0], (token.token, token.log_probability));
        assert!(token.top.is_sorted_by(|one, other| one.1 >= other.1));
    }
    for event in other {
        assert!(!matches!(event, GenerationEvent::Token(token) if !token.top.is_empty()));
    }
    assert!(engine.stats().steps < 2 * 40, "they had no step in common");
}
