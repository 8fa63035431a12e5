//! What an engine has done so far.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What an engine has done, and how it stands after its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Texts that wait for their turn.
    pub waiting: usize,
    /// Texts that are being read or written.
    pub running: usize,
    /// Requests that have ended, in whatever way.
    pub finished: u64,
    /// Steps.
    pub steps: u64,
    /// Tokens of prompts that were read, those read again included.
    pub prompt_tokens: u64,
    /// Tokens that needed no reading, because a text before began with them.
    pub shared_tokens: u64,
    /// Tokens that were drawn, those that end texts included.
    pub generated_tokens: u64,
    /// Tokens of drafts that were read.
    pub drafted_tokens: u64,
    /// Those of them that texts went on by: over the former, how well the drafter guesses.
    pub accepted_tokens: u64,
    /// How often a text had to give its blocks back and wait.
    pub preemptions: u64,
    /// Blocks that texts use.
    pub used_blocks: usize,
    /// Blocks that could be given to texts.
    pub available_blocks: usize,
    /// The time of all steps.
    pub time: Duration,
    /// How much of it the engine took for itself: to plan steps, and to hand tokens out. Where it
    /// [runs ahead](super::GenerationEngineOptions::run_ahead), the device works meanwhile.
    pub scheduling_time: Duration,
}

/// What handles and the thread both know.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) stats: EngineStats,
    /// The names of requests that have not ended.
    pub(super) ids: HashSet<String>,
}

/// Figures and names are whole between any two statements, so what a panic left behind is good.
pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
