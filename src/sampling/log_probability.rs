//! Log-probabilities, for reports and scores.

use mlx_rs::{
    Array, Dtype,
    ops::{indexing::take_along_axis, maximum, select, zeros_dtype},
};

use super::filter::checked_vocabulary;
use crate::{check::Check, error::Result, ids::within, uploads};

/// The natural logarithm of each token's probability: `log softmax(logits)`, in f32.
///
/// A row of −∞ stays −∞; a row with a NaN is NaN, so that a broken model shows.
///
/// # Shapes
/// `[..., V]`, f32, f16 or bf16, to `[..., V]`, f32.
///
/// # Errors
/// When `logits` has no last axis or an empty one, or is not floating point.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::log_probabilities;
/// use mlx_rs::array;
///
/// let y = log_probabilities(&array!([0.0, 0.0]))?;
/// assert!(y.all_close(array!([-0.693_147, -0.693_147]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn log_probabilities(logits: impl AsRef<Array>) -> Result<Array> {
    let logits = logits.as_ref();
    checked_vocabulary(Check::op("log_probabilities"), logits)?;
    let logits = logits.as_dtype(Dtype::Float32)?;
    if logits.size() == 0 {
        return Ok(logits);
    }
    Ok(logits.subtract(log_total(&logits)?)?)
}

/// The log-probability of one token of each row, without those of the others.
///
/// # Shapes
/// - `logits`: `[..., V]`, f32, f16 or bf16
/// - `tokens`: `[...]`, integers; one outside `0..V` gives NaN, for a lazy call cannot refuse it
/// - result: `[...]`, f32
///
/// # Errors
/// When `logits` has no last axis or an empty one or is not floating point, or when `tokens` has
/// another shape or holds no integers.
pub fn token_log_probabilities(
    logits: impl AsRef<Array>,
    tokens: impl AsRef<Array>,
) -> Result<Array> {
    let (logits, tokens) = (logits.as_ref(), tokens.as_ref());
    let check = Check::op("token_log_probabilities");
    let vocabulary = checked_vocabulary(check, logits)?;
    check.integer("tokens", tokens)?;
    let (_, leading) = logits.shape().split_last().unwrap_or((&0, &[]));
    let axes: Vec<_> = leading.iter().map(|&size| size.into()).collect();
    check.shape("tokens", tokens, &axes)?;
    if logits.size() == 0 {
        return Ok(zeros_dtype(leading, Dtype::Float32)?);
    }
    let logits = logits.as_dtype(Dtype::Float32)?;
    let (known, safe) = within(&tokens.expand_dims(-1)?, vocabulary)?;
    let chosen = take_along_axis(&logits, safe, -1)?.subtract(log_total(&logits)?)?;
    Ok(select(known, chosen, uploads::float(f32::NAN))?.squeeze_axes(&[-1])?)
}

/// The logarithm of each row's sum, `[..., 1]`; a number for a row of −∞, so that −∞ less it is −∞.
fn log_total(logits: &Array) -> Result<Array> {
    Ok(maximum(logits.logsumexp_axis(-1, true)?, uploads::float(f32::MIN))?)
}
