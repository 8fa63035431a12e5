//! Drawing tokens from logits.

mod filter;
mod log_probability;

pub use filter::{min_p, top_k, top_p};
pub use log_probability::{log_probabilities, token_log_probabilities};
