//! Tokens that somebody else drew, kept as often as the row itself would draw them.

use mlx_rs::{
    Array, Dtype,
    ops::{
        indexing::{argmax_axis, take_along_axis},
        maximum, minimum, select,
    },
};

use super::{
    Drawn, Filters, Problem,
    reference::{filtered, pick},
};
use crate::{
    dispatch::Dispatch,
    error::Result,
    ids,
    sampling::{
        batch::Proposal,
        bits::bits,
        filter::scores,
        log_probability::token_log_probabilities,
        weights::{log_of, weights_of_centred},
    },
    uploads,
};

/// What each row's token is drawn by, `[N, V]`; nothing where there is nothing to draw.
pub(in crate::sampling) fn probabilities(logits: &Array, filters: &Filters) -> Result<Array> {
    let weights = weights_of_centred(&left(&scores(logits)?, filters)?)?;
    let total = maximum(weights.sum_axis(-1, true)?, uploads::int(1))?;
    Ok(weights.as_dtype(Dtype::Float32)?.divide(total.as_dtype(Dtype::Float32)?)?)
}

/// Keeps a proposed token where a coin of `coins` falls so, and draws another by what the proposal had too little of.
pub(in crate::sampling) fn verify(
    problem: &Problem,
    proposal: &Proposal,
    coins: &Array,
    dispatch: Dispatch,
) -> Result<Drawn> {
    dispatch.resolve(problem)?;
    let Problem { logits, positions, filters, before, .. } = *problem;
    let left = left(&scores(logits)?, filters)?;
    let weights = weights_of_centred(&left)?;
    let total = weights.sum_axis(-1, true)?;
    let expected = likely(proposal.probabilities)?.multiply(total.as_dtype(Dtype::Float32)?)?;
    let missing = weights.subtract(expected.as_dtype(Dtype::Int64)?)?;
    let missing = maximum(missing, uploads::int(0))?;
    // Rounding may leave nothing else to draw.
    let some = missing.max_axis(-1, true)?.gt(uploads::int(0))?;
    let (other, _) = pick(&select(some, missing, &weights)?, &filters.keys, positions)?;

    let (known, proposed) = ids::within(&proposal.tokens.expand_dims(-1)?, logits.dim(-1))?;
    let weight = take_along_axis(&weights, &proposed, -1)?.as_dtype(Dtype::Float32)?;
    let expected = take_along_axis(expected, &proposed, -1)?;
    let falls =
        unit(&bits(coins, positions)?.expand_dims(-1)?)?.multiply(&expected)?.lt(&weight)?;
    let is_proposal = expected.gt(uploads::float(0.0))?.logical_and(known)?;
    let kept = falls.logical_and(is_proposal)?;

    let token = select(kept, proposed, other)?;
    let after = take_along_axis(left, &token, -1)?.subtract(log_of(&total)?)?;
    let [tokens, after] = [token, after].map(|column| column.squeeze_axes(&[-1]));
    let (tokens, after) = (tokens?, after?);
    let before = match before {
        true => token_log_probabilities(logits, &tokens)?,
        false => after.clone(),
    };
    Ok(Drawn { tokens, after, before })
}

/// Numbers from 0 to 1; others are no probabilities, and NaN is none at all.
fn likely(probabilities: &Array) -> Result<Array> {
    let (none, one) = (uploads::float(0.0), uploads::float(1.0));
    Ok(select(probabilities.gt(&none)?, minimum(probabilities, one)?, none)?)
}

/// Scores as they stand before the draw, of greedy rows only the best.
fn left(scores: &Array, filters: &Filters) -> Result<Array> {
    let drawn = filtered(scores, filters)?;
    if !filters.wants.greedy {
        return Ok(drawn);
    }
    let none = uploads::float(f32::NEG_INFINITY);
    let places = Array::arange::<_, u32>(0, scores.dim(-1), None)?;
    let is_best = places.eq(argmax_axis(scores, -1, true)?)?.logical_and(scores.gt(&none)?)?;
    let best = select(is_best, uploads::float(0.0), none)?;
    let greedy = filters.rates.eq(uploads::float(0.0))?.expand_dims(-1)?;
    Ok(select(greedy, best, drawn)?)
}

/// The upper 24 of 64 bits as a number from 0 up to 1.
fn unit(bits: &Array) -> Result<Array> {
    let upper = bits.floor_divide(uploads::numbers(vec![1 << 40]))?;
    Ok(upper.as_dtype(Dtype::Float32)?.multiply(uploads::float(2.0_f32.powi(-24)))?)
}
