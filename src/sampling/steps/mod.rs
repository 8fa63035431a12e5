//! The steps of a chain, each a function of the logits of all rows and of an array with a number
//! for each row, `[N, 1]`, which is such that a row for which the step is off stays as it is.
//!
//! Scores are f32 and hold no NaN; what may not be drawn is −∞.

mod adjust;
mod dry;
mod filters;
mod surprise;

pub(super) use adjust::{Bias, Penalties, penalize};
pub(super) use dry::{DryRows, dry};
pub(super) use filters::{min_p, temper, temper_some, top_k, top_n_sigma, top_p};
pub(super) use surprise::{mirostat, surprise_of, typical_p, without_top_choices};

use mlx_rs::{Array, ops::select};

use crate::{error::Result, uploads};

/// The marked scores, and −∞ for the rest.
fn only(scores: &Array, marked: &Array) -> Result<Array> {
    Ok(select(marked, scores, uploads::float(f32::NEG_INFINITY))?)
}
