//! Chains of samplers, asked oddly.

use mlx_primitives::{Backend, Dispatch, Error, Result, sampling::*};
use mlx_rs::Dtype::{Float32, Int32, Uint32};

use super::{FLOATING, Hostile, INTEGERS, NUMBERS, judge};

impl Hostile {
    fn ids(&mut self, vocabulary: i32) -> Vec<u32> {
        let count = self.0.below(3);
        let usual = |hostile: &mut Self| hostile.0.below(vocabulary.max(1) as usize) as u32;
        (0..count).map(|_| usual(self)).collect()
    }

    fn chain_params(&mut self, vocabulary: i32) -> SamplingParams {
        let mut number = |usual: f32| self.or(usual, &NUMBERS);
        let (temperature, top_p, min_p) = (number(0.8), number(0.9), number(0.1));
        let (typical_p, repetition_penalty) = (number(0.9), number(1.2));
        let xtc = Xtc { probability: number(0.5), threshold: number(0.1), ..Default::default() };
        let dry =
            Dry { multiplier: number(1.0), base: number(1.5), range: 5, ..Default::default() };
        let mirostat = Mirostat { tau: number(3.0), eta: number(0.1) };
        let (sigma, presence_penalty) = (number(1.0), number(0.5));
        SamplingParams {
            seed: self.0.below(9) as u64,
            temperature,
            top_k: self.or(3, &INTEGERS),
            top_p,
            min_p,
            typical_p: self.pick(&[1.0, typical_p]),
            top_n_sigma: self.maybe(sigma),
            xtc: self.maybe(()).map(|()| xtc),
            dry: self.maybe(()).map(|()| dry),
            mirostat: self.maybe(mirostat),
            repetition_penalty: self.pick(&[1.0, repetition_penalty]),
            presence_penalty: self.pick(&[0.0, presence_penalty]),
            banned_tokens: self.ids(vocabulary),
            min_tokens: 2,
            stop_tokens: self.ids(vocabulary),
            ..Default::default()
        }
    }
}

/// Two steps of a batch of requests, some of them plain.
pub(super) fn chains(hostile: &mut Hostile) {
    let (rows, vocabulary) = (hostile.pick(&[0, 1, 2, 3]), hostile.pick(&[1, 2, 7, 33]));
    let dispatch = hostile.dispatch();
    // Each variant of a kernel is compiled for itself, so there are to be few.
    let any = dispatch != Dispatch::Only(Backend::Kernel);
    let dtype = if any { hostile.pick(&FLOATING) } else { Float32 };
    let requests: Result<Vec<_>> = (0..rows)
        .map(|_| {
            let plain = hostile.pick(&[true, false]);
            let params =
                if plain { SamplingParams::default() } else { hostile.chain_params(vocabulary) };
            let text = hostile.ids(vocabulary);
            let history = TokenHistory::new(&params, vocabulary, &text, &text)?;
            Ok((params, history))
        })
        .collect();
    let size = hostile.or(vocabulary, &INTEGERS);
    let top = if any { hostile.or(1, &INTEGERS) } else { 0 };
    let options = SamplerBatchOptions { top, dispatch, ..Default::default() };
    let batch = requests.and_then(|requests| SamplerBatch::new(requests, size, options));
    let (logits, positions) =
        (hostile.array(&[rows, vocabulary], dtype), hostile.array(&[rows], Int32));
    match batch.and_then(|batch| two_steps(batch, &logits, &positions)) {
        Ok(sampled) => {
            judge("SamplerBatch", Ok(sampled.tokens), &[rows], Uint32);
            judge("SamplerBatch", Ok(sampled.log_probabilities), &[rows], Float32);
        }
        Err(Error::Mlx(error)) => panic!("SamplerBatch: left to MLX: {error}"),
        Err(error) => {
            let by = ["[SamplerBatch] ", "[SamplingParams] ", "[TokenHistory] "];
            assert!(by.iter().any(|op| error.to_string().starts_with(op)), "{error}");
        }
    }
}

fn two_steps(
    mut batch: SamplerBatch,
    logits: &mlx_rs::Array,
    positions: &mlx_rs::Array,
) -> Result<Sampled> {
    let sampled = batch.sample(logits, positions)?;
    batch.advance(&sampled)?;
    batch.sample(logits, positions)
}
