//! Penalties of tokens that would prolong a repetition.

use mlx_rs::{
    Array, Dtype,
    ops::{indexing::scatter_max_single, minimum, select, zeros_dtype},
};

use crate::{
    error::Result,
    sampling::{history::Recent, places::places},
    uploads,
};

/// The numbers of all rows' DRY, `[N, 1]`, and their breakers, `[N, 1, B]`, filled up with -1.
#[derive(Debug, Clone)]
pub(in crate::sampling) struct DryRows {
    pub(in crate::sampling) multiplier: Array,
    pub(in crate::sampling) base: Array,
    pub(in crate::sampling) allowed: Array,
    pub(in crate::sampling) breakers: Array,
}

impl DryRows {
    /// Which of `tokens`, `[N, W]`, break repetitions.
    pub(in crate::sampling) fn breaks(&self, tokens: &Array) -> Result<Array> {
        Ok(tokens.expand_dims(-1)?.eq(&self.breakers)?.any_axis(-1, false)?)
    }
}

/// The largest penalty, so that no row of finite logits becomes one of nothing.
const MOST: f32 = 1e30;

/// Takes off each token what its repetition costs: the longest, where it would prolong several.
pub(in crate::sampling) fn dry(scores: &Array, recent: &Recent, rows: &DryRows) -> Result<Array> {
    let window = recent.tokens.dim(-1);
    if window < 2 {
        return Ok(scores.clone());
    }
    // The token after each place is what came after the text up to there.
    let up_to = Array::arange::<_, u32>(0, window - 1, None)?;
    let after = Array::arange::<_, u32>(1, window, None)?;
    let lengths = recent.lengths.take_axis(up_to, -1)?;
    let next = recent.tokens.take_axis(after, -1)?;
    let beyond = lengths.subtract(&rows.allowed)?;
    let exponent = beyond.as_dtype(Dtype::Float32)?;
    let penalty = rows.base.power(exponent)?.multiply(&rows.multiplier)?;
    let zero = uploads::int(0);
    let counts = beyond.ge(&zero)?.logical_and(next.ge(&zero)?)?;
    let counts = counts.logical_and(rows.breaks(&next)?.logical_not()?)?;
    let penalty = minimum(penalty, uploads::float(MOST))?;
    let penalty = select(&counts, penalty, uploads::float(0.0))?;
    let next = select(counts, next, zero)?;
    let none = zeros_dtype(&[scores.dim(0) * scores.dim(1)], Dtype::Float32)?;
    let updates = penalty.reshape(&[-1, 1])?;
    let taken = scatter_max_single(none, places(&next, scores.dim(1))?, updates, 0)?;
    Ok(scores.subtract(taken.reshape(scores.shape())?)?)
}
