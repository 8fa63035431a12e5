//! JSON, regular expressions and grammars, by a model that wants to say anything.

mod errors;
mod json;
mod masks;
mod patterns;

use std::sync::Arc;

use mlx_primitives::{
    attention::KvCache,
    generation::{
        CausalModel, Completion, Constraint, GenerationEngine, GenerationEngineOptions,
        GenerationRequest, Grammars, LayerKv,
    },
    sampling::SamplingParams,
};
use mlx_rs::{Array, error::Exception};

use super::all_texts;
use crate::support::sample::Random;

/// Tokens of several bytes, after one for each byte; the last of them is there twice.
const PIECES: [&str; 36] = [
    "{\"", "\":", "\": ", ", ", ",\"", "\"}", "}}", "]]", "[[", "],[", "e}", "kind", "count",
    "grid", "name", "\"ki", "nd\":\"", "tru", "fal", "se", "12", "100", "99", "  ", "\n", "é",
    "日本", "circle", "squ", "are", "null", "-1", "🙂", "\\u00", "\\n", "true",
];
/// Control tokens, which have no bytes, and the last of them ends texts.
const CONTROL: u32 = 256 + PIECES.len() as u32 + 1;
const END: u32 = CONTROL + 3;
const VOCABULARY: i32 = END as i32 + 1;

fn bytes(token: u32) -> Vec<u8> {
    match (u8::try_from(token), token as usize) {
        (Ok(byte), _) => vec![byte],
        (_, piece @ 256..) if piece < CONTROL as usize => {
            PIECES[(piece - 256).min(PIECES.len() - 1)].as_bytes().to_vec()
        }
        _ => Vec::new(),
    }
}

/// What it says of the next token depends on the last one, and is as good as random.
struct Babbler {
    table: Array,
}

impl Babbler {
    fn new() -> Self {
        let (mut random, size) = (Random::new(12), VOCABULARY as usize);
        // It would rather end what it began than go on for ever.
        let lean = |token: u32| match bytes(token).as_slice() {
            [b'"' | b'}' | b']', ..] => 5.0,
            [b' ' | b'\n' | b'\t' | b'\r', ..] => -1.0,
            [] => 2.0,
            _ => 0.0,
        };
        let logit = |place: usize| (2.0 * random.normal() + lean((place % size) as u32)) as f32;
        let table = (0..size * size).map(logit).collect::<Vec<_>>();
        let table = Array::from_slice(&table, &[VOCABULARY, VOCABULARY]);
        table.eval().unwrap();
        Self { table }
    }
}

impl CausalModel for Babbler {
    fn vocabulary(&self) -> i32 {
        VOCABULARY
    }

    fn layers(&self) -> Vec<LayerKv> {
        Vec::new()
    }

    fn hidden(&mut self, tokens: &Array, _: &mut [&mut dyn KvCache]) -> Result<Array, Exception> {
        self.table.take_axis(tokens, 0)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        Ok(hidden.clone())
    }
}

fn grammars() -> Grammars {
    Grammars::new(&bytes, VOCABULARY, &[END]).unwrap()
}

/// Room for as many tokens, in blocks of 16.
fn engine(tokens: usize) -> GenerationEngine {
    let options = GenerationEngineOptions {
        cache_bytes: GenerationEngineOptions::default().cache_bytes_for(&Babbler::new(), tokens),
        detokenizer: Some(Arc::new(bytes)),
        ..Default::default()
    };
    GenerationEngine::new(Babbler::new(), options).unwrap()
}

fn free(seed: u64, max_tokens: usize) -> GenerationRequest {
    let sampling = SamplingParams { seed, ..Default::default() };
    GenerationRequest { sampling, ..GenerationRequest::new(vec![seed as u32 % 256], max_tokens) }
}

fn greedy(request: GenerationRequest) -> GenerationRequest {
    let sampling = SamplingParams { temperature: 0.0, ..request.sampling };
    GenerationRequest { sampling, ..request }
}

fn under(constraint: &Arc<dyn Constraint>, request: GenerationRequest) -> GenerationRequest {
    GenerationRequest { constraint: Some(constraint.clone()), ..request }
}

/// The text is what its tokens say, and they say nothing else.
fn assert_plain(text: &Completion) {
    let all = text.tokens.iter().flat_map(|&token| bytes(token)).collect::<Vec<_>>();
    assert_eq!(String::from_utf8_lossy(&all), text.text);
    assert!(text.tokens.iter().all(|token| *token < CONTROL), "{text:?}");
}
