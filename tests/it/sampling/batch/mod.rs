mod draws;
mod masked;
mod oracle;
mod refusal;
mod report;
mod rows;
mod state;
mod verify;

use mlx_primitives::{
    Result,
    sampling::{Sampled, SamplerBatch, SamplerBatchOptions, SamplingParams, TokenHistory},
};
use mlx_rs::{Array, ops::broadcast_to};

use self::oracle::Text;

/// Two equal ones, a sure one and some that hardly come.
const LOGITS: [f32; 12] = [0.3, -1.0, 1.2, 0.0, 0.7, -0.4, 0.1, -2.0, 1.2, -0.7, -1.5, 0.5];

fn history(params: &SamplingParams, vocabulary: usize, text: &Text) -> TokenHistory {
    TokenHistory::new(params, vocabulary as i32, &text.prompt, &text.output).unwrap()
}

/// A batch of requests, each after its text.
fn batch(requests: &[(SamplingParams, Text)], vocabulary: usize) -> SamplerBatch {
    batch_on(requests, vocabulary, SamplerBatchOptions::default()).unwrap()
}

fn batch_on(
    requests: &[(SamplingParams, Text)],
    vocabulary: usize,
    options: SamplerBatchOptions,
) -> Result<SamplerBatch> {
    let requests =
        requests.iter().map(|(params, text)| (params.clone(), history(params, vocabulary, text)));
    SamplerBatch::new(requests.collect(), vocabulary as i32, options)
}

/// The same logits for each of so many rows.
fn rows_of(logits: &[f32], count: usize) -> Array {
    let size = logits.len() as i32;
    broadcast_to(Array::from_slice(logits, &[1, size]), &[count as i32, size]).unwrap()
}

fn positions_from(first: usize, count: usize) -> Array {
    let positions: Vec<_> = (first as i32..).take(count).collect();
    Array::from_slice(&positions, &[count as i32])
}

fn tokens(sampled: &Sampled) -> Vec<u32> {
    sampled.tokens.to_vec_cast::<u32>().unwrap()
}
