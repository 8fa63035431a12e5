//! What the tests of several files share.

use std::{env, path::PathBuf};

use serde::Deserialize;

use crate::llama::{gguf::Checkpoint, tokenizer::Tokenizer};

/// The model named by `MLX_PRIMITIVES_TEST_MODEL`; without one the caller's test is skipped,
/// except under continuous integration, where a skip would go unseen.
pub(crate) fn model_path() -> Option<PathBuf> {
    let path = env::var_os("MLX_PRIMITIVES_TEST_MODEL").map(PathBuf::from);
    if path.is_none() {
        let in_ci = env::var("CI").is_ok_and(|value| value == "true");
        assert!(!in_ci, "MLX_PRIMITIVES_TEST_MODEL is not set");
        eprintln!("skipped: MLX_PRIMITIVES_TEST_MODEL is not set");
    }
    path
}

/// A prompt and what the independent implementation made of it.
#[derive(Deserialize)]
pub(crate) struct Fixture {
    pub(crate) prompt: String,
    pub(crate) raw: bool,
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<f32>,
}

pub(crate) fn fixtures() -> Vec<Fixture> {
    serde_json::from_str(include_str!("../../../tests/fixtures/smollm2.json")).unwrap()
}

/// A seeded generator (SplitMix64), so that a failure can be repeated.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

/// The tokenizer of that model.
pub(crate) fn model_tokenizer() -> Option<Tokenizer> {
    let checkpoint = Checkpoint::open(&model_path()?).unwrap();
    Some(Tokenizer::new(checkpoint.metadata()).unwrap())
}
