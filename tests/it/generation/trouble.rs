//! What goes wrong stays with whom it belongs to.

use std::{sync::Arc, thread, time::Duration};

use mlx_primitives::{
    attention::KvCache,
    generation::{
        CausalModel, EngineStats, FinishReason, GenerationEngine, GenerationEngineOptions,
        GenerationEvent, GenerationRequest, LayerKv,
    },
    sampling::{LogProbabilities, SamplingParams},
};
use mlx_rs::{
    Array,
    error::Exception,
    ops::{concatenate, select},
};

use super::{Decoder, engine, options, params, prompt, request};

/// A decoder that says what becomes of its logits.
struct Changed<F> {
    decoder: Decoder,
    said: F,
}

impl<F: FnMut(Array) -> Result<Array, Exception>> CausalModel for Changed<F> {
    fn vocabulary(&self) -> i32 {
        self.decoder.vocabulary()
    }

    fn layers(&self) -> Vec<LayerKv> {
        self.decoder.layers()
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        self.decoder.hidden(tokens, caches)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        (self.said)(self.decoder.logits(hidden)?)
    }
}

pub(super) fn changed(
    said: impl FnMut(Array) -> Result<Array, Exception> + Send + 'static,
    options: GenerationEngineOptions,
) -> GenerationEngine {
    GenerationEngine::new(Changed { decoder: Decoder::new(), said }, options).unwrap()
}

/// What five requests get of an engine that writes two texts at once, one of whose steps goes wrong: those that it is not
/// the fault of are whole and right, and nothing is left behind.
fn served_two_at_once(
    said: impl FnMut(Array) -> Result<Array, Exception> + Send + 'static,
    run_ahead: bool,
) -> Vec<FinishReason> {
    let options =
        GenerationEngineOptions { max_batch_size: 2, run_ahead: Some(run_ahead), ..options() };
    let engine = changed(said, options);
    let requests: Vec<_> =
        (0..5).map(|seed| request(prompt(seed, 20), 10, params(seed, 1.0))).collect();
    let streams = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
    let streams = streams.collect::<Vec<_>>();
    let texts = streams.into_iter().map(|stream| stream.completions().swap_remove(0));
    let texts = texts.collect::<Vec<_>>();
    let failed = texts.iter().filter(|text| matches!(text.reason, FinishReason::Failed(_)));
    assert!((1..=2).contains(&failed.count()), "{texts:?}");
    for (text, request) in texts.iter().zip(&requests) {
        if !matches!(text.reason, FinishReason::Failed(_)) {
            let expected = Decoder::new().written(&request.prompt, 10, &request.sampling);
            assert_eq!((&text.tokens, &text.reason), (&expected, &FinishReason::Length));
        }
    }
    assert_eq!(engine.stats().used_blocks, 0);
    texts.into_iter().map(|text| text.reason).collect()
}

#[test]
fn a_failing_step_fails_its_own_requests_and_the_others_finish() {
    let [fails, burns] = ["step 7 fails", "the model panicked: step 7 burns"];
    for (panics, reason, run_ahead) in
        [(false, fails, false), (false, fails, true), (true, burns, false), (true, burns, true)]
    {
        let mut steps = 0;
        let said = move |logits: Array| {
            steps += 1;
            match steps == 7 {
                true if panics => panic!("step 7 burns"),
                true => Err(Exception::custom("step 7 fails")),
                false => Ok(logits),
            }
        };
        let reasons = served_two_at_once(said, run_ahead);
        let expected = FinishReason::Failed(reason.to_owned());
        let known = |reason: &FinishReason| *reason == expected || *reason == FinishReason::Length;
        assert!(reasons.iter().all(known), "{reasons:?}");
        assert_eq!(reasons[4], FinishReason::Length);
    }
}

/// A product that MLX has no code for on a CPU, which it finds out when it evaluates. A Mac's mlx-rs has no such function.
#[cfg(not(target_os = "macos"))]
fn impossible() -> Result<Array, Exception> {
    let x = Array::ones::<f32>(&[32, 32])?;
    let on_cpu = mlx_rs::StreamOrDevice::cpu();
    mlx_rs::with_stream(on_cpu.as_ref(), || mlx_rs::ops::qqmm(&x, &x, None, None, None, "nvfp4"))?
        .sum(None)
}

#[cfg(not(target_os = "macos"))]
#[test]
fn a_step_that_cannot_be_evaluated_fails_its_own_requests_and_the_others_finish() {
    for run_ahead in [false, true] {
        let mut steps = 0;
        let said = move |logits: Array| {
            steps += 1;
            match steps == 5 {
                true => logits.add(impossible()?),
                false => Ok(logits),
            }
        };
        served_two_at_once(said, run_ahead);
    }
}

#[test]
fn what_is_drawn_in_vain_for_an_ended_text_fails_nothing() {
    let alone = [5, 6].map(|seed| request(prompt(3, 9), 12, params(seed, 1.0)));
    let whole = alone.each_ref().map(|request| {
        Decoder::new().written(&request.prompt, request.max_tokens, &request.sampling)
    });
    // It ends the first text, and the second has none of it.
    let end = whole[0].iter().position(|token| !whole[1].contains(token)).unwrap();
    let stop = whole[0][end];
    let sampling = SamplingParams { stop_tokens: vec![stop], ..alone[0].sampling.clone() };
    let both = GenerationRequest { n: 2, sampling, ..alone[0].clone() };
    let mut steps = 0;
    let said = move |logits: Array| {
        steps += 1;
        // The step after that which draws it still has a row for the first text.
        match steps == end + 2 {
            true => logits.add(Array::from_slice(&[f32::NAN, 0.0], &[2, 1, 1])),
            false => Ok(logits),
        }
    };
    let texts = changed(said, options()).generate(both).unwrap();
    assert_eq!(
        (&texts[0].tokens[..], &texts[0].reason),
        (&whole[0][..end], &FinishReason::StopToken(stop))
    );
    assert_eq!((&texts[1].tokens, &texts[1].reason), (&whole[1], &FinishReason::Length));
}

/// The stats, once they are as wanted.
fn settled(engine: &GenerationEngine, wanted: impl Fn(&EngineStats) -> bool) -> EngineStats {
    for _ in 0..1000 {
        let stats = engine.stats();
        if wanted(&stats) {
            return stats;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("still {:?}", engine.stats());
}

#[test]
fn logits_that_are_none_fail_the_request() {
    let nan = |logits: Array| logits.multiply(Array::from_f32(f32::NAN));
    let one_nan = |logits: Array| {
        let only = Array::arange::<_, u32>(0, 61, None)?.eq(Array::from_int(3))?;
        select(only, Array::from_f32(f32::NAN), logits)
    };
    let wide = |logits: Array| concatenate(&[&logits, &logits], -1);
    let cases: [(fn(Array) -> _, _); 3] = [
        (nan, "the model's output is not a number"),
        (one_nan, "the model's output is not a number"),
        (wide, "[CausalModel] logits must have shape [1, 1, 61] but got [1, 1, 122]"),
    ];
    for (said, reason) in cases {
        for log_probabilities in [LogProbabilities::Raw, LogProbabilities::Processed] {
            let options = GenerationEngineOptions { log_probabilities, ..options() };
            let engine = changed(said, options);
            let prompt = prompt(1, 40);
            for sampling in [params(1, 1.0), SamplingParams { typical_p: 0.9, ..params(1, 0.0) }] {
                let text = engine.generate(request(prompt.clone(), 3, sampling)).unwrap();
                assert_eq!(text[0].reason, FinishReason::Failed(reason.to_owned()));
            }
            assert_eq!(engine.stats().shared_tokens, 0, "nobody is given what failed");
        }
    }
}

#[test]
fn a_token_that_is_not_allowed_is_never_handed_out() {
    let none_of_7 = |logits: Array| {
        let only = Array::arange::<_, u32>(0, 61, None)?.eq(Array::from_int(7))?;
        select(only, Array::from_f32(f32::NEG_INFINITY), logits)
    };
    let engine = changed(none_of_7, options());
    let reason = "the model gives no chance to any token that the request allows";
    for sampling in [
        SamplingParams { allowed_tokens: Some(vec![7]), ..params(1, 1.0) },
        SamplingParams { banned_tokens: (0..61).filter(|&id| id != 7).collect(), ..params(1, 0.0) },
        SamplingParams {
            stop_tokens: (0..61).filter(|&id| id != 7).collect(),
            min_tokens: 2,
            ..params(1, 1.0)
        },
    ] {
        let text = engine.generate(request(prompt(1, 5), 3, sampling)).unwrap().swap_remove(0);
        assert_eq!((text.tokens, text.reason), (vec![], FinishReason::Failed(reason.to_owned())));
    }
    assert_eq!(engine.stats().used_blocks, 0);
}

#[test]
fn a_detokenizer_that_panics_fails_the_request() {
    let burning = |token: u32| if token == 7 { panic!("no such word") } else { Vec::new() };
    let options = GenerationEngineOptions { detokenizer: Some(Arc::new(burning)), ..options() };
    let engine = engine(options);
    let only = |token| SamplingParams { allowed_tokens: Some(vec![token]), ..params(1, 1.0) };
    let text = engine.generate(request(prompt(1, 5), 3, only(7))).unwrap().swap_remove(0);
    let reason = "the detokenizer panicked: no such word";
    assert_eq!(text.reason, FinishReason::Failed(reason.to_owned()));
    let text = engine.generate(request(prompt(1, 5), 3, only(8))).unwrap().swap_remove(0);
    assert_eq!((text.tokens, text.reason), (vec![8; 3], FinishReason::Length));
    assert_eq!(engine.stats().used_blocks, 0);
}

#[test]
fn a_name_is_free_once_its_texts_have_ended() {
    let engine = engine(options());
    for round in 1..=20 {
        let id = Some("mine".to_owned());
        let again = GenerationRequest { id, ..request(prompt(1, 5), 2, params(1, 1.0)) };
        engine.generate(again).unwrap();
        let stats = engine.stats();
        assert_eq!((stats.finished, stats.used_blocks, stats.running), (round, 0, 0));
    }
}

#[test]
fn a_dropped_stream_frees_its_blocks() {
    let engine = engine(options());
    let mut dropped = engine.submit(request(prompt(1, 30), 3000, params(1, 1.0))).unwrap();
    let asked = request(prompt(2, 30), 12, params(2, 1.0));
    let kept = engine.submit(asked.clone()).unwrap();
    assert!(matches!(dropped.next(), Some(GenerationEvent::Token(_))));
    drop(dropped);
    let expected = Decoder::new().written(&asked.prompt, 12, &asked.sampling);
    assert_eq!(kept.completions()[0].tokens, expected);
    let stats = settled(&engine, |stats| stats.finished == 2);
    assert_eq!((stats.used_blocks, stats.running), (0, 0), "{stats:?}");
    assert!(stats.generated_tokens < 3000);
}

#[test]
fn a_cancelled_request_says_so_and_its_name_is_free_again() {
    let engine = engine(options());
    let named = || GenerationRequest {
        id: Some("mine".to_owned()),
        n: 2,
        ..request(prompt(1, 3), 2000, params(1, 1.0))
    };
    let mut stream = engine.submit(named()).unwrap();
    assert_eq!(stream.id(), "mine");
    let error = engine.submit(named()).unwrap_err().to_string();
    assert_eq!(error, "[GenerationEngine] id must be that of no other request but got mine");
    stream.next();
    stream.cancel();
    let texts = stream.completions();
    assert!(texts.iter().all(|text| text.reason == FinishReason::Cancelled));
    settled(&engine, |stats| stats.finished == 1);
    drop(engine.submit(named()).unwrap());
}

#[test]
fn an_engine_that_is_dropped_finishes_and_one_that_is_shut_down_does_not() {
    let first = engine(options());
    let stream = first.submit(request(prompt(1, 3), 9, params(1, 1.0))).unwrap();
    drop(first);
    assert_eq!(stream.completions()[0].reason, FinishReason::Length);
    let second = engine(options());
    let stream = second.submit(request(prompt(1, 3), 3000, params(1, 1.0))).unwrap();
    second.shut_down();
    assert_eq!(stream.completions()[0].reason, FinishReason::Cancelled);
}

#[test]
fn handles_go_to_other_threads() {
    let engine = engine(options());
    let text = thread::scope(|scope| {
        let ask = |seed| engine.generate(request(prompt(seed, 4), 5, params(seed, 1.0)));
        let threads = [1, 2, 3].map(|seed| scope.spawn(move || ask(seed).unwrap()));
        threads.map(|thread| thread.join().unwrap()[0].tokens.len())
    });
    assert_eq!(text, [5; 3]);
}
