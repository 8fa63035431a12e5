//! Who goes first, and what is let go first.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use mlx_primitives::{
    cache::Eviction,
    generation::{GenerationEngine, GenerationEngineOptions, GenerationRequest, Policy},
    sampling::SamplingParams,
};

use super::{Decoder, cache_bytes, engine, options, params, prompt, request};

fn wait_for(count: &AtomicUsize, most: usize) {
    while count.load(Relaxed) < most {
        std::thread::yield_now();
    }
}

#[test]
fn the_highest_priority_of_those_who_wait_is_next() {
    // How many texts are there; the first waits for the others.
    let (there, written) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (seen, told) = (there.clone(), written.clone());
    let words = move |token: u32| {
        seen.fetch_max(1, Relaxed);
        wait_for(&seen, 4);
        told.lock().unwrap().push(token);
        Vec::new()
    };
    for (policy, expected) in
        [(Policy::Priority { ageing: 1000 }, [1, 3, 4, 2]), (Policy::Fcfs, [1, 2, 3, 4])]
    {
        let engine = engine(GenerationEngineOptions {
            max_batch_size: 1,
            policy,
            detokenizer: Some(Arc::new(words.clone())),
            ..options()
        });
        let only = |token, priority| {
            let allowed_tokens = Some(vec![token]);
            let sampling = SamplingParams { allowed_tokens, ..params(1, 1.0) };
            GenerationRequest { priority, ..request(prompt(1, 5), 3, sampling) }
        };
        there.store(0, Relaxed);
        let first = engine.submit(only(1, 0)).unwrap();
        wait_for(&there, 1);
        let others = [only(2, -1), only(3, 7), only(4, 2)];
        let others = others.map(|request| engine.submit(request).unwrap());
        there.store(4, Relaxed);
        first.completions();
        for stream in others {
            stream.completions();
        }
        let order = std::mem::take(&mut *written.lock().unwrap());
        assert_eq!(order, expected.map(|token| [token; 3]).concat());
    }
}

#[test]
fn what_is_let_go_first_is_the_callers_choice() {
    for (eviction, found) in [(Eviction::Lru, 64), (Eviction::Fifo, 0)] {
        let options = GenerationEngineOptions { cache_bytes: cache_bytes(144), ..options() };
        let engine = engine(GenerationEngineOptions { eviction: eviction.clone(), ..options });
        let read = |seed| engine.generate(request(prompt(seed, 65), 1, params(1, 1.0))).unwrap();
        // Two prompts of four blocks, the first of which is used again; a third needs the room of one.
        for seed in [1, 2, 1, 3] {
            read(seed);
        }
        let before = engine.stats().shared_tokens;
        read(1);
        assert_eq!(engine.stats().shared_tokens - before, found, "{eviction:?}");
    }
    let none = Eviction::AttentionScore { decay: 2.0 };
    let refused = GenerationEngine::new(
        Decoder::new(),
        GenerationEngineOptions { eviction: none, ..options() },
    );
    assert!(refused.unwrap_err().to_string().contains("decay must be at least 0 and below 1"));
}
