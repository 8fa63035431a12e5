//! The definition, in plain MLX ops.

use mlx_rs::{
    Array,
    ops::{
        cumsum,
        indexing::{argmax_axis, take_along_axis},
        select,
    },
};

use super::{Drawn, Filters, Problem};
use crate::{
    error::Result,
    sampling::{
        bits::bits,
        filter::scores,
        log_probability::token_log_probabilities,
        steps::{min_p, temper, top_k, top_p},
        weights::{log_of, share, weights},
    },
};

pub(super) fn sample(problem: &Problem) -> Result<Drawn> {
    let scores = scores(problem.logits)?;
    let best = argmax_axis(&scores, -1, false)?;
    // What is certain has a logarithm of 0, and what is nothing, of −∞.
    let none = Array::from_f32(f32::NEG_INFINITY);
    let nothing = scores.max_axis(-1, false)?.eq(&none)?;
    let certain = select(nothing, none, Array::from_f32(0.0))?;
    let (tokens, after) = if problem.filters.wants.draw {
        let (drawn, after) = draw(&scores, problem)?;
        let greedy = problem.filters.rates.eq(Array::from_f32(0.0))?;
        (select(&greedy, best, drawn)?, select(greedy, certain, after)?)
    } else {
        (best, certain)
    };
    let before = match problem.before {
        true => token_log_probabilities(problem.logits, &tokens)?,
        false => after.clone(),
    };
    Ok(Drawn { tokens, after, before })
}

/// Scores as they stand before the draw, tempered and filtered.
pub(in crate::sampling) fn filtered(scores: &Array, filters: &Filters) -> Result<Array> {
    let column = |array: &Array| array.expand_dims(-1);
    let mut left = temper(scores, &column(&filters.rates)?)?;
    if filters.wants.top_k {
        left = top_k(&left, &column(&filters.top_k)?)?;
    }
    if filters.wants.top_p {
        left = top_p(&left, &column(&filters.spares)?)?;
    }
    if filters.wants.min_p {
        left = min_p(&left, &column(&filters.reaches)?)?;
    }
    Ok(left)
}

/// The first token up to which the weights add up to more than a random share of all, and its
/// log-probability.
fn draw(scores: &Array, problem: &Problem) -> Result<(Array, Array)> {
    let left = filtered(scores, problem.filters)?;
    let sums = cumsum(weights(&left)?, -1, None, None)?;
    let end = Array::from_slice(&[left.dim(-1) - 1], &[1]);
    let total = sums.take_axis(end, -1)?;
    let random = bits(&problem.filters.keys, problem.positions)?.expand_dims(-1)?;
    let token = argmax_axis(sums.gt(share(&random, &total)?)?, -1, true)?;
    let after = take_along_axis(left, &token, -1)?.subtract(log_of(&total)?)?;
    Ok((token.squeeze_axes(&[-1])?, after.squeeze_axes(&[-1])?))
}
