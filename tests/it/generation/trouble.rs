//! What goes wrong stays with whom it belongs to.

use std::{sync::Arc, thread, time::Duration};

use mlx_primitives::{
    attention::KvCache,
    generation::{
        CausalModel, EngineStats, FinishReason, GenerationEngine, GenerationEngineOptions,
        GenerationEvent, GenerationRequest, LayerKv,
    },
    sampling::SamplingParams,
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

#[test]
fn a_failing_step_fails_its_own_requests_and_the_others_finish() {
    let [fails, burns] = ["step 7 fails", "the model panicked: step 7 burns"];
    for (panics, reason, ahead) in
        [(false, fails, false), (false, fails, true), (true, burns, false), (true, burns, true)]
    {
        let mut steps = 0;
        let said = move |logits| {
            steps += 1;
            match steps == 7 {
                true if panics => panic!("step 7 burns"),
                true => Err(Exception::custom("step 7 fails")),
                false => Ok(logits),
            }
        };
        let engine = changed(
            said,
            GenerationEngineOptions { max_batch_size: 2, run_ahead: ahead, ..options() },
        );
        let requests: Vec<_> =
            (0..5).map(|seed| request(prompt(seed, 20), 10, params(seed, 1.0))).collect();
        let streams = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
        let streams = streams.collect::<Vec<_>>();
        let texts = streams.into_iter().map(|stream| stream.completions().swap_remove(0));
        let texts = texts.collect::<Vec<_>>();
        let failed =
            texts.iter().filter(|text| text.reason == FinishReason::Failed(reason.to_owned()));
        assert!((1..=2).contains(&failed.count()), "{texts:?}");
        for (text, request) in texts.iter().zip(&requests) {
            if text.reason == FinishReason::Length {
                let expected = Decoder::new().written(&request.prompt, 10, &request.sampling);
                assert_eq!(text.tokens, expected);
            }
        }
        assert_eq!(texts[4].reason, FinishReason::Length);
        assert_eq!(engine.stats().used_blocks, 0);
    }
}

/// A step that is put together and cannot be run.
#[cfg(not(target_os = "macos"))]
#[test]
fn a_step_that_cannot_be_evaluated_fails_its_own_requests_and_the_others_finish() {
    for run_ahead in [false, true] {
        let mut steps = 0;
        let said = move |logits: Array| {
            steps += 1;
            match steps == 5 {
                // MLX finds out when it evaluates that it cannot do this.
                true => {
                    let x = Array::ones::<f32>(&[32, 32])?;
                    let product = mlx_rs::ops::qqmm(&x, &x, None, None, None, "nvfp4")?;
                    logits.add(product.sum(None)?)
                }
                false => Ok(logits),
            }
        };
        let options = GenerationEngineOptions { max_batch_size: 2, run_ahead, ..options() };
        let engine = changed(said, options);
        let requests: Vec<_> =
            (0..5).map(|seed| request(prompt(seed, 20), 10, params(seed, 1.0))).collect();
        let streams = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
        let streams = streams.collect::<Vec<_>>();
        let texts = streams.into_iter().map(|stream| stream.completions().swap_remove(0));
        let (mut failed, mut written) = (0, 0);
        for (text, request) in texts.zip(&requests) {
            match text.reason {
                FinishReason::Failed(_) => failed += 1,
                _ => {
                    let expected = Decoder::new().written(&request.prompt, 10, &request.sampling);
                    assert_eq!((text.tokens, text.reason), (expected, FinishReason::Length));
                    written += 1;
                }
            }
        }
        assert!((1..=2).contains(&failed) && failed + written == 5, "{failed} {written}");
        assert_eq!(engine.stats().used_blocks, 0);
    }
}

/// A decoder for which nothing is likely after one of its tokens.
struct SilentAfter {
    decoder: Decoder,
    token: u32,
}

impl CausalModel for SilentAfter {
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
        let hidden = self.decoder.hidden(tokens, caches)?;
        let silent = tokens.eq(Array::from_slice(&[self.token], &[1]))?.expand_dims(-1)?;
        select(silent, Array::from_f32(f32::NAN), hidden)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        self.decoder.logits(hidden)
    }
}

#[test]
fn what_is_drawn_in_vain_for_an_ended_text_fails_nothing() {
    let alone = [5, 6].map(|seed| request(prompt(3, 9), 12, params(seed, 1.0)));
    let whole = alone.each_ref().map(|request| {
        Decoder::new().written(&request.prompt, request.max_tokens, &request.sampling)
    });
    // It ends the first text, and neither the prompt nor the second has it.
    let elsewhere = [&alone[0].prompt[..], &whole[1]].concat();
    let stop = *whole[0].iter().find(|token| !elsewhere.contains(token)).unwrap();
    let sampling = SamplingParams { stop_tokens: vec![stop], ..alone[0].sampling.clone() };
    let both = GenerationRequest { n: 2, sampling, ..alone[0].clone() };
    let model = SilentAfter { decoder: Decoder::new(), token: stop };
    let texts = GenerationEngine::new(model, options()).unwrap().generate(both).unwrap();
    assert_eq!(texts[0].reason, FinishReason::StopToken(stop));
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
    let wide = |logits: Array| concatenate(&[&logits, &logits], -1);
    let cases: [(fn(Array) -> _, _); 2] = [
        (nan, "the model's output is not a number"),
        (wide, "[CausalModel] logits must have shape [1, 1, 61] but got [1, 1, 122]"),
    ];
    for (said, reason) in cases {
        let engine = changed(said, options());
        let prompt = prompt(1, 40);
        for _ in 0..2 {
            let text = engine.generate(request(prompt.clone(), 3, params(1, 1.0))).unwrap();
            assert_eq!(text[0].reason, FinishReason::Failed(reason.to_owned()));
        }
        assert_eq!(engine.stats().shared_tokens, 0, "nobody is given what failed");
    }
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
