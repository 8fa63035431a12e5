//! Drawing tokens from logits.
//!
//! The order of the steps is visible to users, and is: temperature, [`top_k`], [`top_p`],
//! [`min_p`], draw. So a nucleus is that of the tempered distribution, and each filter sees only
//! what those before it left.
//!
//! A NaN among the logits counts as −∞: it is never drawn. A row with nothing to draw from, all
//! −∞ or NaN, gives token 0, whose [`token_log_probabilities`] is −∞ or NaN.

mod draw;
mod filter;
mod log_probability;
mod sampler;

pub use draw::{SamplingOptions, sample};
pub use filter::{min_p, top_k, top_p};
pub use log_probability::{log_probabilities, token_log_probabilities};
pub use sampler::Sampler;
