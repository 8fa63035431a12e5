//! What is held in memory. A process of its own, since MLX counts the bytes of all threads.
#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use mlx_primitives::{
    Layout, Result,
    attention::{
        ChunkedCrossAttentionOptions, FlashAttentionOptions, KvCache, SlidingWindowOptions,
        chunked_cross_attention, flash_attention, orthogonal_features, sliding_window_attention,
    },
    dispatch::{Context, Target},
    generation::{
        CausalModel, FinishReason, GenerationEngine, GenerationEngineOptions, GenerationRequest,
        LayerKv,
    },
    layers::{Attention, AttentionInput, GatedFeedForward},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    memory,
    module::{Module, ModuleParameters},
    random,
    transforms::{eval, fallible_vjp},
};

const MEBIBYTE: usize = 1 << 20;

/// What the test that runs holds.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes at the peak of the gradient of `attend`, forward pass included, beyond its inputs.
fn peak(inputs: [Array; 2], attend: impl Fn(&Array, &Array) -> Result<Array>) -> usize {
    let run = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        Ok(vec![attend(&inputs[0], &inputs[1])?])
    };
    let cotangent = inputs[0].clone();
    eval(&inputs).unwrap();
    memory::clear_cache().unwrap();
    memory::reset_peak_memory().unwrap();
    let before = memory::active_memory().unwrap();
    let (outputs, gradients) = fallible_vjp(run, &inputs, &[cotangent]).unwrap();
    eval(outputs.iter().chain(&gradients)).unwrap();
    memory::peak_memory().unwrap() - before
}

fn sequence(length: i32) -> Array {
    random::normal::<f32>(&[1, 1, length, 16], None, None, None).unwrap()
}

/// How much longer sequences are on a GPU, where MLX keeps what some hundred operations read until they have run.
fn stretch() -> i32 {
    if Context::current().unwrap().target == Target::Cpu { 1 } else { 4 }
}

const LAYOUT: Layout = Layout::Bhsd;

#[test]
fn chunks_of_keys_hold_no_more_than_some_of_the_scores() {
    let _alone = alone();
    let stretch = stretch();
    // All scores would be 256 MiB, on a GPU 1 GiB; those of a chunk are 4.
    let options = ChunkedCrossAttentionOptions { layout: LAYOUT, ..Default::default() };
    let chunked = peak([sequence(1024), sequence(stretch << 16)], |queries, keys| {
        chunked_cross_attention(queries, keys, keys, options.clone())
    });
    let most = 64 * stretch as usize * MEBIBYTE;
    assert!(chunked < most, "{chunked} bytes, not less than {most}");
}

#[test]
fn a_window_holds_no_more_than_some_of_the_scores() {
    let _alone = alone();
    // All scores would be 1 GiB; those of a window are 8 MiB.
    let options = SlidingWindowOptions { layout: LAYOUT, ..Default::default() };
    let long = sequence(1 << 14);
    let window = peak([long.clone(), long], |queries, keys| {
        sliding_window_attention(queries, keys, keys, 64, options.clone())
    });
    assert!(window < 96 * MEBIBYTE, "{window} bytes");
}

#[test]
fn long_sequences_hold_little_more_than_some_of_the_scores() {
    let _alone = alone();
    // All scores would be 256 MiB, on a GPU 4 GiB, and MLX's own op holds three copies and more. On a CPU blocks of queries take
    // 230; a GPU's kernel has none.
    let options = FlashAttentionOptions { causal: true, layout: LAYOUT, ..Default::default() };
    let long = sequence(stretch() << 13);
    let held = peak([long.clone(), long], |queries, keys| {
        flash_attention(queries, keys, keys, options.clone())
    });
    assert!(held < 320 * MEBIBYTE, "{held} bytes");
}

fn held() -> usize {
    memory::active_memory().unwrap()
}

/// 12 MiB, of which gate and up have 8, and what it says of one row.
fn prepared() -> (GatedFeedForward, Array) {
    let mut feed_forward = GatedFeedForward::new(1024, 1024).unwrap();
    eval(feed_forward.parameters().flatten().into_values()).unwrap();
    let before = held();
    feed_forward.prepare_for_inference().unwrap();
    let x = random::normal::<f32>(&[1, 1024], None, None, None).unwrap();
    feed_forward.forward(&x).unwrap().eval().unwrap();
    let grown = held().saturating_sub(before);
    assert!(grown < MEBIBYTE, "{grown} bytes more");
    (feed_forward, x)
}

#[test]
fn prepared_projections_are_held_once() {
    let _alone = alone();
    let (mut feed_forward, x) = prepared();
    let before = held();
    for parameter in feed_forward.parameters_mut().flatten().into_values() {
        *parameter = random::normal::<f32>(parameter.shape(), None, None, None).unwrap();
    }
    feed_forward.forward(&x).unwrap().eval().unwrap();
    let grown = held().saturating_sub(before);
    assert!(grown < MEBIBYTE, "{grown} bytes more with parameters set anew");
}

/// A layer of attention, which knows tokens by their numbers.
struct OneLayer {
    attention: Attention,
    table: Array,
}

impl OneLayer {
    fn new() -> Self {
        let table = random::normal::<f32>(&[8, 32], None, None, None).unwrap();
        let attention = Attention::new(32, 2).unwrap();
        eval([&table].into_iter().chain(attention.parameters().flatten().into_values())).unwrap();
        Self { attention, table }
    }
}

impl CausalModel for OneLayer {
    fn vocabulary(&self) -> i32 {
        8
    }

    fn layers(&self) -> Vec<LayerKv> {
        vec![LayerKv { num_kv_heads: 2, head_dim: 16, value_dim: None, dtype: Dtype::Float32 }]
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        let x = self.table.take_axis(tokens, 0)?;
        let cache = caches.iter_mut().next().map(|cache| &mut **cache as &mut dyn KvCache);
        self.attention.forward(AttentionInput { x: &x, mask: None, cache })
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        hidden.matmul(self.table.t())
    }
}

#[test]
fn steps_write_their_tokens_in_place() {
    let _alone = alone();
    for run_ahead in [false, true] {
        let options = GenerationEngineOptions {
            cache_bytes: 256 * MEBIBYTE,
            run_ahead: Some(run_ahead),
            ..Default::default()
        };
        let engine = GenerationEngine::new(OneLayer::new(), options).unwrap();
        let request = || GenerationRequest::new(vec![1, 2, 3], 100);
        let texts = engine.generate(request()).unwrap();
        assert_eq!(texts[0].reason, FinishReason::Length);
        memory::clear_cache().unwrap();
        memory::reset_peak_memory().unwrap();
        let before = held();
        engine.generate(request()).unwrap();
        // Keys, or values, are 128 MiB.
        let more = memory::peak_memory().unwrap() - before;
        assert!(more < 32 * MEBIBYTE, "run_ahead {run_ahead}: {more} bytes");
    }
}

/// A stream of MLX's CPU back end is a thread, and is never given back.
#[cfg(target_os = "linux")]
#[test]
fn drawing_features_again_takes_no_more_threads() {
    let _alone = alone();
    let draw = |seed| orthogonal_features(random::key(seed).unwrap(), 5, 4).unwrap().eval();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    draw(0).unwrap();
    let before = threads();
    (1..9).for_each(|seed| draw(seed).unwrap());
    // Another test's thread may begin or end meanwhile.
    assert!(threads() < before + 4, "{before} threads were {}", threads());
}
