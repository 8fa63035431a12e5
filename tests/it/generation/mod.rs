//! The engine against a model that reads everything anew, and against everything that may go wrong.

mod constraint;
mod forms;
#[cfg(feature = "llguidance")]
mod grammar;
mod in_place;
mod model;
mod order;
mod refusal;
mod speculation;
mod texts;
mod traced;
mod trouble;

use std::sync::Arc;

use mlx_primitives::{
    generation::{Completion, GenerationEngine, GenerationEngineOptions, GenerationRequest},
    sampling::SamplingParams,
};

use self::model::Decoder;
use crate::support::sample::Random;

/// Room for as many tokens in blocks of 16, one of which is nobody's.
fn cache_bytes(tokens: usize) -> usize {
    // Two layers of keys and values of two heads of 8, f32.
    const TOKEN: usize = 2 * 2 * 2 * 8 * 4;
    (tokens.div_ceil(16) + 1) * 16 * TOKEN
}

fn options() -> GenerationEngineOptions {
    // The bytes of a token are one letter, and of the last ones none.
    let letters =
        |token: u32| if token < 52 { vec![b'a' + (token % 26) as u8] } else { Vec::new() };
    GenerationEngineOptions {
        cache_bytes: cache_bytes(4096),
        detokenizer: Some(Arc::new(letters)),
        // The harder way.
        run_ahead: Some(true),
        ..Default::default()
    }
}

fn engine(options: GenerationEngineOptions) -> GenerationEngine {
    GenerationEngine::new(Decoder::new(), options).unwrap()
}

/// All texts of all requests, which are asked for at once.
fn all_texts(engine: &GenerationEngine, requests: &[GenerationRequest]) -> Vec<Vec<Completion>> {
    let streams = requests.iter().map(|request| engine.submit(request.clone()).unwrap());
    let streams = streams.collect::<Vec<_>>();
    streams.into_iter().map(|stream| stream.completions()).collect()
}

fn prompt(seed: u64, len: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.below(model::VOCABULARY as usize) as u32).collect()
}

fn params(seed: u64, temperature: f32) -> SamplingParams {
    SamplingParams { seed, temperature, ..Default::default() }
}

fn request(prompt: Vec<u32>, max_tokens: usize, sampling: SamplingParams) -> GenerationRequest {
    GenerationRequest { sampling, ..GenerationRequest::new(prompt, max_tokens) }
}
