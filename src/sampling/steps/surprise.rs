//! Filters by surprise, −log p, of tokens.

use std::f32::consts::LN_2;

use mlx_rs::{
    Array, Dtype,
    ops::{argsort_axis, cumsum, indexing::take_along_axis, maximum, select},
};

use super::only;
use crate::{
    error::Result,
    sampling::{
        filter::at_least,
        weights::{log_of, share, weights},
    },
    uploads,
};

/// The weights of a row's tokens, and the surprise of each, in nats; ∞ for what may not be drawn.
fn surprise(scores: &Array) -> Result<(Array, Array)> {
    let weights = weights(scores)?;
    let total = weights.sum_axis(-1, true)?;
    let centred = scores.subtract(super::super::filter::shift(&scores.max_axis(-1, true)?)?)?;
    Ok((weights, log_of(&total)?.subtract(centred)?))
}

/// Keeps the tokens whose surprise is nearest to its mean, until no more than `spare / 2^64` of the
/// probability is left out, u64; one token at least, and of equals the first.
pub(in crate::sampling) fn typical_p(scores: &Array, spare: &Array) -> Result<Array> {
    let size = scores.dim(-1);
    let (weights, surprise) = surprise(scores)?;
    let share_of_all = weights
        .as_dtype(Dtype::Float32)?
        .divide(weights.sum_axis(-1, true)?.as_dtype(Dtype::Float32)?)?;
    let heavy = weights.gt(uploads::int(0))?;
    let zero = uploads::float(0.0);
    let mean = select(heavy, share_of_all.multiply(&surprise)?, zero)?.sum_axis(-1, true)?;
    // The nearest has the largest; what may not be drawn has −∞.
    let nearness = surprise.subtract(mean)?.abs()?.negative()?;
    let order = argsort_axis(&nearness, -1)?;
    let sorted = take_along_axis(&nearness, &order, -1)?;
    let tails = cumsum(take_along_axis(&weights, order, -1)?, -1, None, None)?;
    let total = tails.take_axis(Array::from_slice(&[size - 1], &[1]), -1)?;
    let kept = tails.gt(share(spare, &total)?)?;
    let seats = maximum(kept.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?, uploads::int(1))?;
    let least = take_along_axis(sorted, uploads::int(size).subtract(&seats)?, -1)?;
    let off = spare.eq(uploads::int(0).as_dtype(Dtype::Uint64)?)?;
    only(scores, &at_least(&nearness, &least, &seats)?.logical_or(off)?)
}

/// Where `happens`, drops all tokens at least as likely as `threshold` but the least likely of
/// them, and but those `protected`, `[N, V]`, where there are such.
pub(in crate::sampling) fn without_top_choices(
    scores: &Array,
    happens: &Array,
    threshold: &Array,
    protected: Option<&Array>,
) -> Result<Array> {
    let (_, surprise) = surprise(scores)?;
    let none = uploads::float(f32::NEG_INFINITY);
    // A threshold of 0 is above what may not be drawn, too.
    let likely = surprise.le(threshold.log()?.negative()?)?.logical_and(scores.gt(&none)?)?;
    let least_likely = select(&likely, &surprise, none)?.max_axis(-1, true)?;
    let goes = likely.logical_and(surprise.lt(least_likely)?)?.logical_and(happens)?;
    let stays = goes.logical_not()?;
    let stays = match protected {
        Some(protected) => stays.logical_or(protected)?,
        None => stays,
    };
    only(scores, &stays)
}

/// Keeps tokens of a surprise up to `bound` bits, and the best in any case.
pub(in crate::sampling) fn mirostat(scores: &Array, bound: &Array) -> Result<Array> {
    let (_, surprise) = surprise(scores)?;
    let best = scores.eq(scores.max_axis(-1, true)?)?;
    let kept = surprise.le(bound.multiply(uploads::float(LN_2))?)?;
    // Of equal best ones the first: the sum up to it is one.
    let first = cumsum(best.as_dtype(Dtype::Int32)?, -1, None, None)?.eq(uploads::int(1))?;
    only(scores, &kept.logical_or(best.logical_and(first)?)?)
}

/// The surprise of `tokens`, `[N, 1]`, in bits.
pub(in crate::sampling) fn surprise_of(scores: &Array, tokens: &Array) -> Result<Array> {
    let (_, surprise) = surprise(scores)?;
    Ok(take_along_axis(surprise, tokens, -1)?.divide(uploads::float(LN_2))?)
}
