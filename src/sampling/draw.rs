//! One draw for each row of logits.

use mlx_rs::{
    Array, Dtype,
    ops::{indexing::argmax_axis, maximum, stack, zeros_dtype},
    random::gumbel,
};

use super::filter::{
    check_k, check_min_p, check_top_p, checked_vocabulary, min_p, scores, shift, top_k, top_p,
};
use crate::{
    check::{Check, axes},
    error::Result,
    splitmix::scramble,
    uploads,
};

const OP: &str = "sample";

/// Options of [`sample`], in the order in which they apply.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token. Default: 1.
    pub temperature: f32,
    /// Draws from this many of the most likely tokens; 0 for all, the default.
    pub top_k: i32,
    /// Draws from the most likely tokens whose probability reaches this; 1 for all, the default.
    pub top_p: f32,
    /// Draws from tokens at least this fraction as likely as the most likely; 0 for all, the
    /// default.
    pub min_p: f32,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl SamplingOptions {
    pub(super) fn check(&self) -> Result<()> {
        Check::op(OP).non_negative("temperature", self.temperature)?;
        check_k(OP, "top_k", self.top_k)?;
        check_top_p(OP, "top_p", self.top_p)?;
        check_min_p(OP, "min_p", self.min_p)
    }
}

/// Draws a token for each row from `softmax(logits / temperature)`, filtered.
///
/// `token = argmax(filtered + Gumbel noise)`, in f32. The noise of row `r` depends on `key` and `r`
/// alone, so that what else is in a batch never changes a row's token. A `temperature` of 0 is
/// `argmax(logits)`, the lowest index of equal ones.
///
/// # Shapes
/// - `logits`: `[..., V]`, f32, f16 or bf16
/// - `key`: `[2]`, u32, of [`mlx_rs::random::key`], of which each row takes a variation; or
///   `[..., 2]`, a key for each row
/// - result: `[...]`, u32
///
/// # Errors
/// When `logits` has no last axis or an empty one or is not floating point, when `key` is no key,
/// when `temperature` is negative or not finite, `top_k` negative, `top_p` outside (0, 1] or
/// `min_p` outside [0, 1].
///
/// # Example
/// ```
/// use mlx_primitives::sampling::{SamplingOptions, sample};
/// use mlx_rs::{array, random};
///
/// let logits = array!([[0.0, 9.0, 1.0], [5.0, 0.0, 1.0]]);
/// let options = SamplingOptions { top_k: 1, ..Default::default() };
/// let tokens = sample(&logits, &random::key(7)?, &options)?;
/// assert!(tokens.all_close(array!([1, 0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn sample(
    logits: impl AsRef<Array>,
    key: impl AsRef<Array>,
    options: &SamplingOptions,
) -> Result<Array> {
    let (logits, key) = (logits.as_ref(), key.as_ref());
    let vocabulary = checked_vocabulary(Check::op(OP), logits)?;
    let (_, leading) = logits.shape().split_last().unwrap_or((&0, &[]));
    let rows = (logits.size() / vocabulary as usize) as i32;
    options.check()?;
    let keys = row_keys(key, leading, rows)?;
    if rows == 0 {
        return Ok(zeros_dtype(leading, Dtype::Uint32)?);
    }
    let scores = scores(logits)?;
    if options.temperature == 0.0 {
        return Ok(argmax_axis(scores, -1, false)?);
    }
    let noise = noise(&keys, vocabulary)?.reshape(logits.shape())?;
    Ok(argmax_axis(filtered(&scores, options)?.add(noise)?, -1, false)?)
}

/// The scores as they stand before the draw.
fn filtered(scores: &Array, options: &SamplingOptions) -> Result<Array> {
    // Subtracting the largest first keeps a tiny temperature from overflowing.
    let centred = scores.subtract(shift(&scores.max_axis(-1, true)?)?)?;
    let tempered = centred.divide(uploads::float(options.temperature))?;
    min_p(top_p(top_k(tempered, options.top_k)?, options.top_p)?, options.min_p, 1)
}

/// A key for each row, apart from each other: `[2]` each.
fn row_keys(key: &Array, leading: &[i32], rows: i32) -> Result<Vec<Array>> {
    let check = Check::op(OP);
    check.dtype_among("key", key, &[Dtype::Uint32])?;
    if key.ndim() == 1 {
        check.shape("key", key, axes![2])?;
        return (0..rows as u64).map(|row| row_key(key, row)).collect();
    }
    let axes: Vec<_> = leading.iter().map(|&size| size.into()).chain([2.into()]).collect();
    check.shape("key", key, &axes)?;
    let keys = key.reshape(&[rows, 2])?;
    (0..rows).map(|row| Ok(keys.take_axis(uploads::int(row), 0)?)).collect()
}

/// The key of one row, `key` itself for the first. Keys of neighbouring seeds differ by 1, and so must not those of rows.
fn row_key(key: &Array, row: u64) -> Result<Array> {
    let far = scramble(row) ^ scramble(0);
    Ok(key.add(Array::from_slice(&[(far >> 32) as u32, far as u32], &[2]))?)
}

/// Gumbel noise, `[rows, V]`, drawn row by row: one draw for all would depend on their number.
fn noise(keys: &[Array], vocabulary: i32) -> Result<Array> {
    let rows: Vec<_> =
        keys.iter().map(|key| gumbel::<f32>(&[vocabulary], key)).collect::<Result<_, _>>()?;
    // MLX's uniform may be 0, and its noise then −∞, which must not tie with what was filtered
    // out; the next smallest gives −3.1.
    Ok(maximum(stack(&rows, 0)?, uploads::float(-4.0))?)
}
