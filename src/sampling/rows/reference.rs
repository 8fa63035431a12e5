//! The definition, in plain MLX ops.

use mlx_rs::{
    Array, Dtype,
    ops::{
        cumsum,
        indexing::{argmax_axis, take_along_axis},
        maximum, minimum, partition_axis, select, sort_axis,
    },
};

use super::{Drawn, Filters, Problem};
use crate::{
    error::Result,
    sampling::{
        bits::bits,
        filter::{at_least, scores},
        log_probability::token_log_probabilities,
        steps::temper,
        weights::{log_of, share, weights_of_centred},
    },
    uploads,
};

pub(super) fn sample(problem: &Problem) -> Result<Drawn> {
    let scores = scores(problem.logits)?;
    let wants = problem.filters.wants;
    let (tokens, after) = match (wants.draw, wants.greedy) {
        (true, false) => draw(&scores, problem)?,
        (false, _) => best(&scores)?,
        (true, true) => {
            let (drawn, after_draw) = draw(&scores, problem)?;
            let (best, after_best) = best(&scores)?;
            let greedy = problem.filters.rates.eq(uploads::float(0.0))?;
            (select(&greedy, best, drawn)?, select(greedy, after_best, after_draw)?)
        }
    };
    let before = match problem.before {
        true => token_log_probabilities(problem.logits, &tokens)?,
        false => after.clone(),
    };
    Ok(Drawn { tokens, after, before })
}

/// The best of each row. What is certain has a logarithm of 0, and what is nothing, of −∞.
fn best(scores: &Array) -> Result<(Array, Array)> {
    let token = argmax_axis(scores, -1, true)?;
    let none = uploads::float(f32::NEG_INFINITY);
    let nothing = take_along_axis(scores, &token, -1)?.eq(&none)?;
    let after = select(nothing, none, uploads::float(0.0))?;
    Ok((token.squeeze_axes(&[-1])?, after.squeeze_axes(&[-1])?))
}

/// A token for each row, and its log-probability.
fn draw(scores: &Array, problem: &Problem) -> Result<(Array, Array)> {
    let left = filtered(scores, problem.filters)?;
    let (token, total) =
        pick(&weights_of_centred(&left)?, &problem.filters.keys, problem.positions)?;
    let after = take_along_axis(left, &token, -1)?.subtract(log_of(&total)?)?;
    Ok((token.squeeze_axes(&[-1])?, after.squeeze_axes(&[-1])?))
}

/// The first token up to which the weights add up to more than a random share of all, and what all weigh; `[N, 1]` each.
pub(super) fn pick(weights: &Array, keys: &Array, positions: &Array) -> Result<(Array, Array)> {
    let sums = cumsum(weights, -1, None, None)?;
    let total = last(&sums)?;
    let random = bits(keys, positions)?.expand_dims(-1)?;
    let token = argmax_axis(sums.gt(share(&random, &total)?)?, -1, true)?;
    Ok((token, total))
}

/// Scores as they stand before the draw: tempered, the best 0, and filtered.
pub(in crate::sampling) fn filtered(scores: &Array, filters: &Filters) -> Result<Array> {
    let wants = filters.wants;
    let scores = temper(scores, &filters.rates.expand_dims(-1)?)?;
    let likely = match wants.min_p {
        // The best is 0.
        true => Some(scores.ge(filters.reaches.expand_dims(-1)?.negative()?)?),
        false => None,
    };
    let seated = match wants.top_k || wants.top_p {
        true => Some(seated(&scores, filters)?),
        false => None,
    };
    let kept = match (likely, seated) {
        (Some(likely), Some(seated)) => likely.logical_and(seated)?,
        (Some(kept), None) | (None, Some(kept)) => kept,
        (None, None) => return Ok(scores),
    };
    Ok(select(kept, scores, uploads::float(f32::NEG_INFINITY))?)
}

/// Marks what top-k and then top-p keep: of both, no more than the number of seats has to be known.
fn seated(scores: &Array, filters: &Filters) -> Result<Array> {
    let sorted = sorted(scores, filters)?;
    let count = uploads::int(sorted.dim(-1));
    let top_k = filters.top_k.expand_dims(-1)?;
    let mut seats = minimum(&top_k, &count)?;
    let mut whole = top_k.ge(uploads::int(scores.dim(-1)))?;
    if filters.wants.top_p {
        let place = Array::arange::<_, i32>(0, sorted.dim(-1), None)?;
        let sits = place.ge(count.subtract(&seats)?)?;
        let weights = select(sits, weights_of_centred(&sorted)?, uploads::int(0))?;
        // Each weight and all that are smaller.
        let tails = cumsum(weights, -1, None, None)?;
        let spare = filters.spares.expand_dims(-1)?;
        let kept = tails.gt(share(&spare, &last(&tails)?)?)?;
        let kept = maximum(kept.sum_axis(-1, true)?, uploads::int(1))?;
        let off = spare.eq(uploads::int(0).as_dtype(Dtype::Uint64)?)?;
        seats = select(&off, seats, kept)?;
        whole = whole.logical_and(off)?;
    }
    let least = take_along_axis(sorted, count.subtract(&seats)?, -1)?;
    // Where all are kept, so is what a part of the row does not show.
    Ok(at_least(scores, &least, &seats)?.logical_or(whole)?)
}

/// The scores in ascending order; only those that any row may keep, where that is a small part.
fn sorted(scores: &Array, filters: &Filters) -> Result<Array> {
    let size = scores.dim(-1);
    match filters.wants.most_seats {
        Some(most) if most < size / 4 => {
            let places = Array::arange::<_, u32>(size - most, size, None)?;
            let part = partition_axis(scores, size - most, -1)?.take_axis(places, -1)?;
            Ok(sort_axis(part, -1)?)
        }
        _ => Ok(sort_axis(scores, -1)?),
    }
}

/// The last of each row.
fn last(rows: &Array) -> Result<Array> {
    Ok(rows.take_axis(Array::from_slice(&[rows.dim(-1) - 1], &[1]), -1)?)
}
