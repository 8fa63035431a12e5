//! How an engine works.

use std::{fmt, sync::Arc};

use super::{
    model::{BlockForms, CausalModel, token_bytes},
    scheduler::Policy,
    text::Detokenizer,
};
use crate::{
    attention::BlockForm,
    cache::{Eviction, PagedPoolOptions},
    check::Check,
    dispatch::Target,
    error::Result,
    sampling::LogProbabilities,
};

/// Options of [`GenerationEngine`](super::GenerationEngine).
#[derive(Clone)]
pub struct GenerationEngineOptions {
    /// How many texts are written at once, at most as many as `max_batch_tokens`. Default: 32.
    pub max_batch_size: usize,
    /// How many tokens a step reads at most, of all texts together. Default: 2048.
    pub max_batch_tokens: usize,
    /// How many tokens of one prompt a step reads at most, so that a long one leaves room for others. Default: 512.
    pub max_prompt_chunk: usize,
    /// How many tokens of a draft a step reads at most, of each text, where there is a
    /// [`Drafter`](super::Drafter). Default: 4.
    pub max_draft_tokens: usize,
    /// What the keys and values of all texts take, in bytes, allocated at the start. Default: 1 GiB.
    pub cache_bytes: usize,
    /// How keys are stored. 8 bits hold about twice as many tokens as f16, with the errors that [`BlockForm`] gives. Default: as
    /// the model makes them.
    pub cache_keys: BlockForm,
    /// How values are stored. Default: as the model makes them.
    pub cache_values: BlockForm,
    /// Whether prompts that begin alike are read once. Default: yes.
    pub share_prefixes: bool,
    /// Part of the hashes by which prefixes are found. Default: nothing.
    pub salt: Vec<u8>,
    /// Which blocks that no text uses any more are evicted first. An engine computes no attention scores, so
    /// [`Eviction::AttentionScore`] ranks all blocks alike. Default: least recently used.
    pub eviction: Eviction,
    /// Whether the host builds a step while the device still runs the one before, without knowing its tokens, so that the device
    /// does not wait for the host.
    ///
    /// - A text that ends at a stop token or stop string costs one more step, whose result is dropped.
    /// - A new request waits one step longer, and does not share blocks that this step fills.
    /// - It is not done while there is a drafter, while a running request has a constraint, or when blocks are nearly used up.
    /// - A step is submitted early only where kernels write the tokens of every layer, as on an NVIDIA GPU.
    ///
    /// On an H200 a model of 8B parameters gained a third, with one text and with 32, and a small model up to a half; on a slower
    /// host, 32 texts of the small model lost up to a quarter. Default: yes on an NVIDIA GPU, and no elsewhere, where it was not
    /// measured.
    pub run_ahead: Option<bool>,
    /// Who goes first. Default: whoever came first.
    pub policy: Policy,
    /// Which distribution log-probabilities are those of. Default: the model's.
    pub log_probabilities: LogProbabilities,
    /// Turns tokens into text. Default: none; then there are tokens only.
    pub detokenizer: Option<Arc<dyn Detokenizer>>,
}

impl Default for GenerationEngineOptions {
    fn default() -> Self {
        Self {
            max_batch_size: 32,
            max_batch_tokens: 2048,
            max_prompt_chunk: 512,
            max_draft_tokens: 4,
            cache_bytes: 1 << 30,
            cache_keys: BlockForm::Plain,
            cache_values: BlockForm::Plain,
            share_prefixes: true,
            salt: Vec::new(),
            eviction: Eviction::default(),
            run_ahead: None,
            policy: Policy::default(),
            log_probabilities: LogProbabilities::default(),
            detokenizer: None,
        }
    }
}

impl fmt::Debug for GenerationEngineOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerationEngineOptions")
            .field("max_batch_size", &self.max_batch_size)
            .field("max_batch_tokens", &self.max_batch_tokens)
            .field("max_prompt_chunk", &self.max_prompt_chunk)
            .field("max_draft_tokens", &self.max_draft_tokens)
            .field("cache_bytes", &self.cache_bytes)
            .field("cache_keys", &self.cache_keys)
            .field("cache_values", &self.cache_values)
            .field("share_prefixes", &self.share_prefixes)
            .field("eviction", &self.eviction)
            .field("run_ahead", &self.run_ahead)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl GenerationEngineOptions {
    /// The [`cache_bytes`](Self::cache_bytes) that a text of so many tokens needs in these forms of keys and values, or shorter
    /// ones of as many blocks.
    pub fn cache_bytes_for<M: CausalModel>(&self, model: &M, tokens: usize) -> usize {
        let block = PagedPoolOptions::DEFAULT_BLOCK_SIZE.unsigned_abs() as usize;
        // One block is nobody's, and a pool has two or more.
        let blocks = tokens.max(1).div_ceil(block).saturating_add(1);
        token_bytes(model, self.forms()).saturating_mul(block).saturating_mul(blocks)
    }

    /// Whether an engine on such a device [runs ahead](Self::run_ahead).
    pub(super) fn runs_ahead(&self, target: Target) -> bool {
        self.run_ahead.unwrap_or(target == Target::Cuda)
    }

    /// How many texts may be written at once: every step has a token for each.
    pub(super) fn texts_at_once(&self) -> usize {
        self.max_batch_size.min(self.max_batch_tokens)
    }

    pub(super) fn forms(&self) -> BlockForms {
        [self.cache_keys, self.cache_values]
    }

    pub(super) fn check(&self, check: Check) -> Result<()> {
        let counts = [
            ("max_batch_size", self.max_batch_size),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_prompt_chunk", self.max_prompt_chunk),
        ];
        counts
            .into_iter()
            .try_for_each(|(name, count)| check.value(count > 0, name, "be at least 1", count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_nvidia_gpu_alone_runs_ahead_by_itself() {
        let with = |run_ahead| GenerationEngineOptions { run_ahead, ..Default::default() };
        for target in [Target::Cpu, Target::Metal, Target::Cuda] {
            assert_eq!(with(None).runs_ahead(target), target == Target::Cuda, "{target:?}");
            assert!(with(Some(true)).runs_ahead(target) && !with(Some(false)).runs_ahead(target));
        }
    }
}
