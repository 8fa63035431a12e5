//! Text from a model: many requests at once, over a pool of keys and values.
//!
//! ```text
//! submit(request) -> stream      any thread: the checks, and a channel
//! drafter.draft(texts)           guesses of how they go on, where there is somebody to guess
//! listen, schedule               the engine's thread: who gets which tokens of the next step
//! runner.run(batch)              the model over a row for each token; draws for each text that goes on
//! deliver, client.record         tokens into texts, and out through the channels
//! ```
//!
//! The scheduler knows no model and no array but those of its pool; the runner knows no request but how it draws.

mod client;
mod constrained;
mod constraint;
mod engine;
#[cfg(feature = "llguidance")]
mod grammar;
mod model;
mod options;
mod panicked;
mod reader;
mod request;
mod runner;
mod samplers;
mod scheduler;
mod speculation;
mod stats;
mod stream;
mod text;
mod worker;

/// Of what is traced here.
const TARGET: &str = "mlx_primitives::generation";

pub use constraint::{Allowed, Constraint, ConstraintError};
pub use engine::GenerationEngine;
#[cfg(feature = "llguidance")]
pub use grammar::{Grammar, Grammars};
pub use model::{CausalModel, LayerKv};
pub use options::GenerationEngineOptions;
pub use request::{
    Completion, Finish, FinishReason, GeneratedToken, GenerationEvent, GenerationRequest,
};
pub use scheduler::Policy;
pub use speculation::{
    Draft, DraftModel, DraftModelOptions, DraftedText, Drafter, PromptLookup, TextId,
};
pub use stats::EngineStats;
pub use stream::GenerationStream;
pub use text::{Detokenizer, TextStream};
