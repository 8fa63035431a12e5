//! Which keys each query may see, and what is added to its scores.
//!
//! Causality, window and segments leave each query an interval of keys, and a mask hides some of them.
//!
//! A softmax over no key has no value: MLX answers NaN or the mean of all values, by mask and by
//! device. So a row that hides every key is made to show them all, and its result is cleared
//! afterwards, which leaves it without a gradient too. All of it is lazy.

use mlx_rs::{
    Array, Dtype,
    ops::{arange, indexing::TryIndexOp, maximum, minimum, select},
};

use super::{
    dims::Dims,
    options::{Segments, Window},
    problem::Problem,
};
use crate::{error::Result, uploads};

/// Additive entries from here down hide their key. Half of the range of f16, so that what remains
/// can be added to a score, or change its base in a kernel, and stay finite.
const HIDES: f32 = -32768.0;

/// The keys that take part in each softmax; never none.
pub(super) struct Visible {
    /// True where a key takes part; broadcasts to `[B, H, S_q, S_kv]`. `None` if all do.
    pub(super) keys: Option<Array>,
    /// `[.., S_q, 1]`: true for queries that see a key. `None` if all do.
    queries: Option<Array>,
    /// Added to the scores, and finite also where it stands for a hidden key.
    pub(super) bias: Option<Array>,
}

impl Visible {
    pub(super) fn new(problem: &Problem) -> Result<Self> {
        let place = Place::new(problem)?;
        let mask = problem.mask.map(|mask| with_rank_4(mask, problem.dtype)).transpose()?;
        let by_mask = mask.as_ref().map(visible_in).transpose()?;
        let keys = both(place.keys(&problem.dims)?, by_mask.as_ref())?;
        let bias = both_added(added(mask, by_mask)?, place.alibi(problem)?)?;

        let hidden_rows = problem.mask.is_some()
            || problem.segments.is_some()
            || problem.dims.queries_before_keys(problem.window) > 0;
        let Some(keys) = keys.as_ref().filter(|_| hidden_rows) else {
            return Ok(Self { keys, queries: None, bias });
        };
        let queries = keys.any_axis(-1, true)?;
        let keys = keys.logical_or(queries.logical_not()?)?;
        Ok(Self { keys: Some(keys), queries: Some(queries), bias })
    }

    /// A mask for MLX's op: boolean if nothing is added, else of `dtype` and −∞ at hidden keys.
    pub(super) fn as_mask(&self, dtype: Dtype) -> Result<Option<Array>> {
        match (&self.keys, &self.bias) {
            (keys, None) => Ok(keys.clone()),
            (None, Some(bias)) => Ok(Some(bias.as_dtype(dtype)?)),
            (Some(keys), Some(bias)) => {
                let hidden = scalar(f32::NEG_INFINITY, dtype)?;
                Ok(Some(select(keys, bias.as_dtype(dtype)?, hidden)?))
            }
        }
    }

    /// Puts `empty`, or else zero, into the rows of `[B, H, S_q, _]` that see no key.
    pub(super) fn clear_hidden_rows(&self, rows: Array, empty: Option<Array>) -> Result<Array> {
        let Some(queries) = &self.queries else { return Ok(rows) };
        let empty = empty.map_or_else(|| scalar(0.0, rows.dtype()), Ok)?;
        Ok(select(queries, rows, empty)?)
    }
}

/// Where each query stands among the keys. All are `[S_q, 1]`, i32.
struct Place {
    /// The key beside it.
    beside: Array,
    /// The first key it may see.
    first: Option<Array>,
    /// One past the last.
    end: Option<Array>,
}

impl Place {
    fn new(problem: &Problem) -> Result<Self> {
        let dims = &problem.dims;
        let row = column(dims.first_query, dims.query_length)?;
        let place = match problem.segments {
            Some(segments) => Self::in_segments(segments, &row)?,
            None => Self { beside: row.add(uploads::int(dims.offset))?, first: None, end: None },
        };
        place.within(problem.window)
    }

    fn in_segments(segments: Segments, row: &Array) -> Result<Self> {
        let last = segments.queries.dim(0) - 2;
        let (starts, ends) = (segments.queries.try_index(..-1)?, segments.queries.try_index(1..)?);
        let passed = row.ge(&ends)?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
        let outside = row.lt(starts.try_index(0)?)?.logical_or(passed.gt(uploads::int(last))?)?;

        let segment = minimum(passed, uploads::int(last))?;
        let next = segment.add(uploads::int(1))?;
        let (first, end) =
            (segments.keys.take_axis(&segment, 0)?, segments.keys.take_axis(&next, 0)?);
        let beside = row.add(&end)?.subtract(segments.queries.take_axis(&next, 0)?)?;
        let end = select(outside, &first, end)?;
        Ok(Self { beside, first: Some(first), end: Some(end) })
    }

    fn within(self, window: Window) -> Result<Self> {
        let Self { beside, mut first, mut end } = self;
        if let Some(left) = window.left {
            let bound = beside.subtract(uploads::int(left))?;
            first = Some(first.map_or_else(|| Ok(bound.clone()), |first| maximum(first, &bound))?);
        }
        if let Some(right) = window.right {
            let bound = beside.add(uploads::int(right + 1))?;
            end = Some(end.map_or_else(|| Ok(bound.clone()), |end| minimum(end, &bound))?);
        }
        Ok(Self { beside, first, end })
    }

    /// `[S_q, S_kv]`: true where a query may see a key.
    fn keys(&self, dims: &Dims) -> Result<Option<Array>> {
        let key = column(dims.first_key, dims.key_length)?.flatten(None, None)?;
        let from_first = self.first.as_ref().map(|first| key.ge(first)).transpose()?;
        let before_end = self.end.as_ref().map(|end| key.lt(end)).transpose()?;
        both(from_first, before_end.as_ref())
    }

    /// `[B, H, S_q, S_kv]` or `[1, H, S_q, S_kv]`, f32.
    fn alibi(&self, problem: &Problem) -> Result<Option<Array>> {
        let Some(slopes) = problem.alibi_slopes else { return Ok(None) };
        let dims = &problem.dims;
        let key = column(dims.first_key, dims.key_length)?.flatten(None, None)?;
        let distance = key.subtract(&self.beside)?.abs()?.as_dtype(Dtype::Float32)?;
        let slopes = slopes.as_dtype(Dtype::Float32)?.reshape(&[-1, dims.heads, 1, 1])?;
        Ok(Some(slopes.negative()?.multiply(distance)?))
    }
}

/// `[count, 1]`, counting up from `first`.
fn column(first: i32, count: i32) -> Result<Array> {
    Ok(arange::<i32, i32>(first, first + count, None)?.expand_dims(-1)?)
}

/// Views a mask as `[B, H, S_q, S_kv]` with ones for missing axes; `dtype` if it is additive.
pub(super) fn with_rank_4(mask: &Array, dtype: Dtype) -> Result<Array> {
    let missing: Vec<_> = (0..4 - mask.ndim() as i32).collect();
    let mask = mask.expand_dims_axes(&missing)?;
    match mask.dtype() {
        Dtype::Bool => Ok(mask),
        _ => Ok(mask.as_dtype(dtype)?),
    }
}

fn visible_in(mask: &Array) -> Result<Array> {
    match mask.dtype() {
        Dtype::Bool => Ok(mask.clone()),
        // Not `mask > HIDES`: NaN must reach the result.
        dtype => Ok(mask.le(scalar(HIDES, dtype)?)?.logical_not()?),
    }
}

/// What an additive mask adds where it does not hide.
fn added(mask: Option<Array>, visible: Option<Array>) -> Result<Option<Array>> {
    match (mask, visible) {
        (Some(mask), Some(visible)) if mask.dtype() != Dtype::Bool => {
            Ok(Some(select(visible, &mask, scalar(0.0, mask.dtype())?)?))
        }
        _ => Ok(None),
    }
}

fn both(a: Option<Array>, b: Option<&Array>) -> Result<Option<Array>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some(a.logical_and(b)?)),
        (a, b) => Ok(a.or_else(|| b.cloned())),
    }
}

fn both_added(a: Option<Array>, b: Option<Array>) -> Result<Option<Array>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some(a.add(b)?)),
        (a, b) => Ok(a.or(b)),
    }
}

fn scalar(value: f32, dtype: Dtype) -> Result<Array> {
    Ok(uploads::float(value).as_dtype(dtype)?)
}
