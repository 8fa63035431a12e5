//! Filters: what may not be drawn becomes −∞.

use mlx_rs::{
    Array, Dtype,
    ops::{cumsum, indexing::take_along_axis, maximum, minimum, partition_axis, select, sort_axis},
};

use crate::{check::Check, error::Result, uploads};

/// Keeps the `k` largest logits of each row and makes the rest −∞; `k = 0` keeps all.
///
/// Exactly `min(k, V)` survive: of equal logits, those of the lowest index.
///
/// # Shapes
/// `[..., V]`, f32, f16 or bf16, to the same.
///
/// # Errors
/// When `logits` has no last axis or an empty one or is not floating point, or when `k` is
/// negative.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::top_k;
/// use mlx_rs::array;
///
/// let kept = top_k(&array!([1.0, 3.0, 2.0, 3.0]), 2)?;
/// let none = f32::NEG_INFINITY;
/// assert!(kept.all_close(array!([none, 3.0, none, 3.0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn top_k(logits: impl AsRef<Array>, k: i32) -> Result<Array> {
    let logits = logits.as_ref();
    let vocabulary = checked_vocabulary(Check::op("top_k"), logits)?;
    check_k("top_k", "k", k)?;
    if k == 0 || logits.size() == 0 {
        return Ok(logits.clone());
    }
    let scores = scores(logits)?;
    keep(logits, &scores, best(&scores, k.min(vocabulary))?)
}

/// Keeps the smallest set of logits whose probability reaches `p` and makes the rest −∞; `p = 1`
/// keeps all.
///
/// The best always survives; of equal logits, those of the lowest index. The probabilities are
/// `softmax(logits)` in f32.
///
/// # Shapes
/// `[..., V]`, f32, f16 or bf16, to the same.
///
/// # Errors
/// When `logits` has no last axis or an empty one or is not floating point, or when `p` is not in
/// (0, 1].
///
/// # Example
/// ```
/// use mlx_primitives::sampling::top_p;
/// use mlx_rs::array;
///
/// let kept = top_p(&array!([0.0, 2.0, 1.0]), 0.9)?;
/// assert!(kept.all_close(array!([f32::NEG_INFINITY, 2.0, 1.0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Holtzman et al., [The Curious Case of Neural Text Degeneration](https://arxiv.org/abs/1904.09751),
/// 2019.
pub fn top_p(logits: impl AsRef<Array>, p: f32) -> Result<Array> {
    let logits = logits.as_ref();
    let vocabulary = checked_vocabulary(Check::op("top_p"), logits)?;
    check_top_p("top_p", "p", p)?;
    if p == 1.0 || logits.size() == 0 {
        return Ok(logits.clone());
    }
    let scores = scores(logits)?;
    let sorted = sort_axis(&scores, -1)?;
    let last = Array::from_slice(&[vocabulary - 1], &[1]);
    let weights = sorted.subtract(shift(&sorted.take_axis(&last, -1)?)?)?.exp()?;
    // Each weight and all that are smaller, summed from the smallest, so that a long tail is not
    // rounded away. A token is kept while its tail weighs more than what may be dropped.
    let tails = cumsum(weights, -1, None, None)?;
    let spare = uploads::float((1.0 - f64::from(p)) as f32);
    let dropped = tails.take_axis(&last, -1)?.multiply(spare)?;
    let seats = tails.gt(dropped)?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
    let seats = maximum(seats, uploads::int(1))?;
    let least = take_along_axis(&sorted, uploads::int(vocabulary).subtract(&seats)?, -1)?;
    keep(logits, &scores, at_least(&scores, &least, &seats)?)
}

/// Keeps the logits whose probability is at least `p` times that of the best, and the `min_keep`
/// best in any case, and makes the rest −∞; `p = 0` keeps all.
///
/// # Shapes
/// `[..., V]`, f32, f16 or bf16, to the same.
///
/// # Errors
/// When `logits` has no last axis or an empty one or is not floating point, when `p` is not in
/// [0, 1], or when `min_keep` is below one.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::min_p;
/// use mlx_rs::array;
///
/// let logits = array!([0.0, -1.0, -3.0]);
/// let kept = min_p(&logits, 0.3, 1)?;
/// assert!(kept.all_close(array!([0.0, -1.0, f32::NEG_INFINITY]), None, None, None)?);
/// assert!(min_p(&logits, 0.3, 3)?.all_close(&logits, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Nguyen et al., [Turning Up the Heat: Min-p Sampling](https://arxiv.org/abs/2407.01082), 2024.
pub fn min_p(logits: impl AsRef<Array>, p: f32, min_keep: i32) -> Result<Array> {
    let logits = logits.as_ref();
    let check = Check::op("min_p");
    let vocabulary = checked_vocabulary(check, logits)?;
    check_min_p("min_p", "p", p)?;
    check.at_least("min_keep", min_keep, 1)?;
    if p == 0.0 || logits.size() == 0 {
        return Ok(logits.clone());
    }
    let scores = scores(logits)?;
    let floor = scores.max_axis(-1, true)?.add(uploads::float(p.ln()))?;
    let likely = scores.ge(floor)?;
    let kept = match min_keep.min(vocabulary) {
        1 => likely,
        sure => likely.logical_or(best(&scores, sure)?)?,
    };
    keep(logits, &scores, kept)
}

pub(super) fn check_k(op: &'static str, name: &'static str, k: i32) -> Result<()> {
    Check::op(op).at_least(name, k, 0)
}

pub(super) fn check_top_p(op: &'static str, name: &'static str, p: f32) -> Result<()> {
    Check::op(op).value(p > 0.0 && p <= 1.0, name, "be above 0 and at most 1", p)
}

pub(super) fn check_min_p(op: &'static str, name: &'static str, p: f32) -> Result<()> {
    Check::op(op).value((0.0..=1.0).contains(&p), name, "be from 0 to 1", p)
}

/// `V`, once `logits` has been checked.
pub(super) fn checked_vocabulary(check: Check, logits: &Array) -> Result<i32> {
    check.floating("logits", logits)?;
    check.last_axis("logits", logits)
}

/// The logits in f32 with NaN as −∞ and +∞ as the largest number, so that they compare and
/// subtract.
pub(super) fn scores(logits: &Array) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let none = uploads::float(f32::NEG_INFINITY);
    // A comparison with NaN is false.
    let real = select(logits.ge(&none)?, &logits, none)?;
    Ok(minimum(real, uploads::float(f32::MAX))?)
}

/// What to subtract from a row of scores whose largest is `max`, so that its largest becomes 0: for
/// a row of −∞, a number, for −∞ would make it NaN.
pub(super) fn shift(max: &Array) -> Result<Array> {
    Ok(maximum(max, uploads::float(f32::MIN))?)
}

/// Marks the `k` largest scores of each row, `0 < k <= V`.
fn best(scores: &Array, k: i32) -> Result<Array> {
    let from_end = scores.dim(-1) - k;
    let partitioned = partition_axis(scores, from_end, -1)?;
    let least = partitioned.take_axis(Array::from_slice(&[from_end], &[1]), -1)?;
    at_least(scores, &least, &uploads::int(k))
}

/// Marks `seats` scores of each row: those above `least`, and the first of those equal to it.
///
/// No sort has to be stable for this to be exact under ties.
pub(super) fn at_least(scores: &Array, least: &Array, seats: &Array) -> Result<Array> {
    let above = scores.gt(least)?;
    let left = seats.subtract(above.sum_axis(-1, true)?)?;
    let tied = scores.eq(least)?;
    let place = cumsum(tied.as_dtype(Dtype::Int32)?, -1, None, None)?;
    Ok(above.logical_or(tied.logical_and(place.le(left)?)?)?)
}

/// The marked logits, and −∞ for the rest.
fn keep(logits: &Array, scores: &Array, kept: Array) -> Result<Array> {
    let none = uploads::float(f32::NEG_INFINITY);
    let kept = kept.logical_and(scores.gt(&none)?)?;
    Ok(select(kept, logits, none.as_dtype(logits.dtype())?)?)
}
