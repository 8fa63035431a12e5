//! Drawing tokens from logits.
//!
//! [`SamplerBatch`] draws for the requests of a batch, each with its own chain of steps ([`SamplingParams`]);
//! [`sample`] draws once, with the same options for every row, from a key. The order of the steps is data
//! of a request. By default it is that of [`Step::ALL`]: penalties, DRY, biases, temperature, top-n-sigma,
//! [`top_k`], [`top_p`], [`min_p`], typical-p, XTC, Mirostat. Each filter sees only what those before it
//! kept, so a nucleus is that of the tempered distribution.
//!
//! A NaN among the logits counts as −∞: it is never drawn. A row with nothing to draw from, all
//! −∞ or NaN, gives token 0, whose [`token_log_probabilities`] is −∞ or NaN.

mod filter;
mod log_probability;
mod weights;
mod bits;
mod places;
mod params;
mod history;
mod mask;
mod steps;
mod rows;
mod batch;
mod draw;

pub use batch::{
    Conditions, LogProbabilities, Proposal, Sampled, SamplerBatch, SamplerBatchOptions,
    TopLogProbabilities,
};
pub use draw::{SamplingOptions, sample};
pub use filter::{min_p, top_k, top_p};
pub use history::TokenHistory;
pub use log_probability::{log_probabilities, token_log_probabilities};
pub use mask::TokenMask;
pub use params::{Dry, Mirostat, SamplingParams, Step, Xtc};
pub(crate) use rows::KERNELS as SAMPLE_ROWS_KERNELS;
pub(crate) use weights::MAX_VOCABULARY;

/// The token of a row that has nothing to draw from.
pub(crate) const NOTHING_TO_DRAW: u32 = 0;
