//! Filters by how likely tokens are beside each other.

use mlx_rs::{
    Array, Dtype,
    ops::{cumsum, indexing::take_along_axis, maximum, minimum, select, sort_axis},
};

use super::only;
use crate::{
    error::Result,
    sampling::{
        filter::{at_least, shift},
        weights::{share, weights},
    },
    uploads,
};

/// Multiplies what scores are below the largest by `rate`, the reciprocal of a temperature; 0
/// counts as 1.
pub(in crate::sampling) fn temper(scores: &Array, rate: &Array) -> Result<Array> {
    tempered(scores, &shift(&scores.max_axis(-1, true)?)?, rate)
}

fn tempered(scores: &Array, largest: &Array, rate: &Array) -> Result<Array> {
    let none = rate.eq(uploads::float(0.0))?;
    let rate = select(none, uploads::float(1.0), rate)?;
    // Subtracting the largest first keeps a tiny temperature from overflowing.
    Ok(scores.subtract(largest)?.multiply(rate)?)
}

/// The same of rows of which `rate` is neither 0 nor 1, and how far these are then below what they would be uncentred, `[N, 1]`,
/// for a step that has to know. Others stay to the bit what they are.
pub(in crate::sampling) fn temper_some(scores: &Array, rate: &Array) -> Result<(Array, Array)> {
    let (none, one) = (uploads::float(0.0), uploads::float(1.0));
    let off = rate.eq(&none)?.logical_or(rate.eq(one)?)?;
    let largest = shift(&scores.max_axis(-1, true)?)?;
    let left = select(&off, scores, tempered(scores, &largest, rate)?)?;
    // So large, it decides as any larger one would.
    let most = uploads::float(1e30);
    let below = maximum(minimum(largest.multiply(rate)?, &most)?, most.negative()?)?;
    Ok((left, select(off, none, below)?))
}

/// Keeps the `k` best of each row, i32; `k` of `V` or more keeps all.
pub(in crate::sampling) fn top_k(scores: &Array, k: &Array) -> Result<Array> {
    let size = uploads::int(scores.dim(-1));
    let seats = minimum(k, &size)?;
    let sorted = sort_axis(scores, -1)?;
    let least = take_along_axis(sorted, size.subtract(&seats)?, -1)?;
    only(scores, &at_least(scores, &least, &seats)?)
}

/// Drops the least likely tokens of each row that together weigh no more than `spare / 2^64` of it,
/// u64; but never the best.
pub(in crate::sampling) fn top_p(scores: &Array, spare: &Array) -> Result<Array> {
    let size = scores.dim(-1);
    let sorted = sort_axis(scores, -1)?;
    // Each weight and all that are smaller.
    let tails = cumsum(weights(&sorted)?, -1, None, None)?;
    let total = tails.take_axis(Array::from_slice(&[size - 1], &[1]), -1)?;
    let kept = tails.gt(share(spare, &total)?)?;
    let seats = maximum(kept.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?, uploads::int(1))?;
    let least = take_along_axis(sorted, uploads::int(size).subtract(&seats)?, -1)?;
    let kept = at_least(scores, &least, &seats)?;
    // Off, it keeps the tokens too that weigh nothing.
    let off = spare.eq(uploads::int(0).as_dtype(Dtype::Uint64)?)?;
    only(scores, &kept.logical_or(off)?)
}

/// Keeps scores no further than `reach` below the best.
pub(in crate::sampling) fn min_p(scores: &Array, reach: &Array) -> Result<Array> {
    only(scores, &scores.ge(scores.max_axis(-1, true)?.subtract(reach)?)?)
}

/// Keeps scores no more than `sigmas` standard deviations below the best. What may not be drawn
/// has no part in the deviation.
pub(in crate::sampling) fn top_n_sigma(scores: &Array, sigmas: &Array) -> Result<Array> {
    let zero = uploads::float(0.0);
    let finite = scores.gt(uploads::float(f32::NEG_INFINITY))?;
    let count = maximum(finite.as_dtype(Dtype::Float32)?.sum_axis(-1, true)?, uploads::float(1.0))?;
    let best = shift(&scores.max_axis(-1, true)?)?;
    // From the best, for the mean of large logits would round.
    let below = select(&finite, scores.subtract(&best)?, &zero)?;
    let mean = below.sum_axis(-1, true)?.divide(&count)?;
    let off = select(&finite, below.subtract(&mean)?, &zero)?;
    let deviation = off.square()?.sum_axis(-1, true)?.divide(count)?.sqrt()?;
    let reach = deviation.multiply(sigmas)?;
    // Infinitely many of no deviation are no number.
    let everything = sigmas.eq(uploads::float(f32::INFINITY))?;
    let kept = scores.ge(best.subtract(reach)?)?.logical_or(everything)?;
    only(scores, &kept)
}
