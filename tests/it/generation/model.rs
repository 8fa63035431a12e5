//! A small decoder with random weights, and what it writes when it reads everything anew for each token.

use mlx_primitives::{
    attention::KvCache,
    generation::{CausalModel, LayerKv},
    layers::{AttentionBuilder, AttentionInput, DecoderBlock, GatedFeedForward},
    rope::Rope,
    sampling::{SamplerBatch, SamplerBatchOptions, SamplingParams, TokenHistory},
};
use mlx_rs::{
    Array, Dtype, builder::Builder, error::Exception, module::Module, module::ModuleParameters,
    ops::indexing::TryIndexOp, transforms::eval,
};

use crate::support::sample::normal;

pub(super) const VOCABULARY: i32 = 61;
const DIMS: i32 = 32;

pub(super) struct Decoder {
    table: Array,
    blocks: Vec<DecoderBlock>,
}

impl Decoder {
    /// The same one each time.
    pub(super) fn new() -> Self {
        Self::of(10)
    }

    /// One for each number.
    pub(super) fn of(first: u64) -> Self {
        let mut blocks = vec![block(), block()];
        for (seed, block) in (first..).step_by(100).zip(&mut blocks) {
            let mut names: Vec<_> = block.parameters_mut().flatten().into_iter().collect();
            names.sort_by(|one, other| one.0.cmp(&other.0));
            for (seed, (name, parameter)) in (seed..).zip(names) {
                if !name.contains("norm") {
                    *parameter = scaled(normal(seed, parameter.shape(), Dtype::Float32), 0.25);
                }
            }
        }
        let table = scaled(normal(1, &[VOCABULARY, DIMS], Dtype::Float32), 0.3);
        eval([&table]).unwrap();
        eval(blocks.iter().flat_map(|block| block.parameters().flatten().into_values())).unwrap();
        Self { table, blocks }
    }

    fn embedded(&self, tokens: &Array) -> Result<Array, Exception> {
        self.table.take_axis(tokens, 0)
    }

    /// What it says after `tokens`, `[1, V]`.
    fn said(&mut self, tokens: &[u32]) -> Array {
        let mut x = self.embedded(&Array::from_slice(tokens, &[1, tokens.len() as i32])).unwrap();
        for block in &mut self.blocks {
            x = block.forward(&x).unwrap();
        }
        self.logits(&x.try_index((.., -1)).unwrap()).unwrap()
    }

    /// What it writes after `prompt`, by reading all of it for each token.
    pub(super) fn written(
        &mut self,
        prompt: &[u32],
        count: usize,
        params: &SamplingParams,
    ) -> Vec<u32> {
        self.written_within(prompt, count, params, |_, _| true)
    }

    /// The same, where `open` says which tokens may follow an output.
    pub(super) fn written_within(
        &mut self,
        prompt: &[u32],
        count: usize,
        params: &SamplingParams,
        open: impl Fn(&[u32], u32) -> bool,
    ) -> Vec<u32> {
        let mut output = Vec::new();
        for _ in 0..count {
            let text = [prompt, &output].concat();
            let history = TokenHistory::new(params, VOCABULARY, prompt, &output).unwrap();
            let batch = SamplerBatch::new(
                vec![(params.clone(), history)],
                VOCABULARY,
                SamplerBatchOptions::default(),
            );
            let position = Array::from_slice(&[text.len() as i32], &[1]);
            let said = self.said(&text);
            let shut = (0..).zip(said.as_slice::<f32>()).map(|(token, &logit)| {
                if open(&output, token) { logit } else { f32::NEG_INFINITY }
            });
            let logits = Array::from_slice(&shut.collect::<Vec<_>>(), said.shape());
            let sampled = batch.unwrap().sample(logits, position).unwrap();
            output.push(sampled.tokens.as_slice::<u32>()[0]);
        }
        output
    }
}

fn block() -> DecoderBlock {
    let attention = AttentionBuilder::new(DIMS, 4).num_kv_heads(2).rope(Rope::new(8).unwrap());
    let feed_forward = GatedFeedForward::new(DIMS, 48).unwrap();
    DecoderBlock::new(DIMS, attention.build().unwrap(), feed_forward).unwrap()
}

fn scaled(array: Array, by: f32) -> Array {
    array.multiply(Array::from_f32(by)).unwrap()
}

impl CausalModel for Decoder {
    fn vocabulary(&self) -> i32 {
        VOCABULARY
    }

    fn layers(&self) -> Vec<LayerKv> {
        let layer =
            LayerKv { num_kv_heads: 2, head_dim: 8, value_dim: None, dtype: Dtype::Float32 };
        vec![layer; self.blocks.len()]
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        let mut x = self.embedded(tokens)?;
        for (block, cache) in self.blocks.iter_mut().zip(caches) {
            x = block.forward(AttentionInput { x: &x, mask: None, cache: Some(&mut **cache) })?;
        }
        Ok(x)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        hidden.matmul(self.table.t())
    }
}
