//! How much of each step is left at a later one.

use mlx_rs::{
    Array, Dtype,
    ops::{
        concatenate, exp,
        indexing::{Ellipsis, TryIndexOp},
        maximum, pad, select, tri,
    },
};

use super::{passes::Pass, places::Places};
use crate::{
    error::Result,
    scan::{ScanOperator, ScanOptions, associative_scan},
    uploads,
};

/// Decays of chunks, as sums of logarithms from the start of each.
pub(in crate::scan) struct Fade {
    /// `[B, G, R, n, Q, 1]`, or with a decay for each element of a key `[B, G, R, n, Q, K]`; f32.
    sums: Array,
    pub(in crate::scan) places: Option<Places>,
}

/// Steps of a part of a chunk in which decays for each element of a key meet pair by pair.
const PART: i32 = 16;

/// The logarithm of a decay that leaves nothing in f32. Smaller ones, −∞ most of all, would spoil sums with others.
pub(in crate::scan) const NOTHING_LEFT: f32 = -100.0;

impl Fade {
    /// `logarithms` has the shape of [`Fade::sums`].
    pub(in crate::scan) fn new(logarithms: &Array, places: Option<Places>) -> Result<Self> {
        let logarithms =
            maximum(logarithms.as_dtype(Dtype::Float32)?, uploads::float(NOTHING_LEFT))?;
        let along_steps = ScanOptions { axis: -2, ..Default::default() };
        let sums = associative_scan(&logarithms, ScanOperator::Add, along_steps)?;
        Ok(Self { sums, places })
    }

    pub(in crate::scan) fn sums(&self) -> &Array {
        &self.sums
    }

    fn by_key(&self) -> bool {
        self.sums.dim(-1) > 1
    }

    fn ends(&self) -> Result<Array> {
        Ok(self.sums.try_index((Ellipsis, -1.., ..))?)
    }

    /// What is left of a state after a whole chunk: `[B, G, R, n, 1 or K, 1]`.
    pub(in crate::scan) fn through(&self) -> Result<Array> {
        let left = exp(self.ends()?.swap_axes(-1, -2)?)?;
        masked(left, self.places.as_ref().map(|places| &places.alive))
    }

    /// What is left of a state at each step: `[B, G, R, n, Q, 1 or K]`.
    pub(in crate::scan) fn since_start(&self) -> Result<Array> {
        masked(exp(&self.sums)?, self.places.as_ref().map(|places| &places.entered))
    }

    /// What is left of each step at the end of its chunk, of the same shape.
    pub(in crate::scan) fn to_end(&self) -> Result<Array> {
        let left = exp(self.ends()?.subtract(&self.sums)?)?;
        masked(left, self.places.as_ref().map(|places| &places.leaving))
    }

    /// The outer products of all steps of a chunk as they are at its end: `[B, G, R, n, K, V]`, in the dtype of `values`.
    pub(in crate::scan) fn gathered(&self, keys: &Array, values: &Array) -> Result<Array> {
        outer(keys, values, &self.to_end()?)
    }

    /// `near`, and what queries read of the states before their chunks: `[B, G, R, n, Q, V]`, in `dtype`.
    pub(in crate::scan) fn read_beside(
        &self,
        near: &Array,
        queries: &Array,
        states: &Array,
        dtype: Dtype,
    ) -> Result<Array> {
        let (operand, left) = (queries.dtype(), self.since_start()?);
        let states = states.as_dtype(operand)?;
        match self.by_key() {
            true => {
                let far = Pass::Scaled.run(operand, &[queries.clone(), left])?.matmul(states)?;
                let [near, far] = [near, &far].map(|array| array.as_dtype(Dtype::Float32));
                Ok(near?.add(far?)?.as_dtype(dtype)?)
            }
            false => Pass::Added.run(dtype, &[near.clone(), queries.matmul(states)?, left]),
        }
    }

    /// What each query has to do with each earlier key of its chunk, and its own: `[B, G, R, n, Q, Q]`, in the dtype of the
    /// keys.
    pub(in crate::scan) fn scores(&self, queries: &Array, keys: &Array) -> Result<Array> {
        let (visible, dtype) = (self.visible(0)?, keys.dtype());
        if self.by_key() {
            return Ok(self.scores_by_key(queries, keys, &visible)?.as_dtype(dtype)?);
        }
        let products = queries.matmul(keys.swap_axes(-1, -2)?)?;
        Pass::Weighed
            .run(dtype, &[products, self.sums.clone(), self.sums.swap_axes(-1, -2)?, visible])
    }

    /// What is left of each step at each later one: `[B, G, R, n, Q, Q]`, zero where not `visible`; for one decay a head.
    pub(in crate::scan) fn between(&self, visible: &Array) -> Result<Array> {
        left(&self.sums, &self.sums.swap_axes(-1, -2)?, visible)
    }

    /// Whether a step sees another that is `lag` or more before it: `[Q, Q]` or `[n, Q, Q]`.
    pub(in crate::scan) fn visible(&self, lag: i32) -> Result<Array> {
        let past = tri::<bool>(self.sums.dim(-2), None, Some(-lag))?;
        match &self.places {
            Some(places) => Ok(places.same.logical_and(past)?),
            None => Ok(past),
        }
    }

    /// A product of a query, a key and what is left of each of its elements. For keys of earlier parts of the chunk the decay
    /// is split at the start of the query's part, so that neither share is above 1; within a part it is taken for each pair.
    fn scores_by_key(&self, queries: &Array, keys: &Array, visible: &Array) -> Result<Array> {
        let (steps, dtype) = (self.sums.dim(-2), queries.dtype());
        let [queries, keys] = [queries, keys].map(|array| array.as_dtype(Dtype::Float32));
        let (queries, keys) = (queries?, keys?);
        let mut rows = Vec::new();
        for start in (0..steps).step_by(PART as usize) {
            let end = steps.min(start + PART);
            let part =
                |array: &Array, range: std::ops::Range<i32>| array.try_index((Ellipsis, range, ..));
            let (own, sums) = (part(&queries, start..end)?, part(&self.sums, start..end)?);
            let mut blocks = Vec::new();
            if start > 0 {
                let border = part(&self.sums, start - 1..start)?;
                let left = own.multiply(exp(sums.subtract(&border)?)?)?.as_dtype(dtype)?;
                let earlier = exp(border.subtract(part(&self.sums, 0..start)?)?)?;
                let earlier = part(&keys, 0..start)?.multiply(earlier)?.as_dtype(dtype)?;
                blocks.push(left.matmul(earlier.swap_axes(-1, -2)?)?.as_dtype(Dtype::Float32)?);
            }
            let difference = sums.expand_dims(-2)?.subtract(sums.expand_dims(-3)?)?;
            let past = tri::<bool>(end - start, None, None)?.expand_dims(-1)?;
            let left = exp(select(past, difference, uploads::float(f32::NEG_INFINITY))?)?;
            let pairs = own.expand_dims(-2)?.multiply(part(&keys, start..end)?.expand_dims(-3)?)?;
            blocks.push(pairs.multiply(left)?.sum_axis(-1, false)?);
            let row = concatenate(&blocks, -1)?;
            rows.push(pad_columns(&row, steps)?);
        }
        let scores = concatenate(&rows, -2)?;
        Ok(select(visible, scores, uploads::float(0.0))?)
    }
}

/// What is left of an earlier step at a later one, by their sums of logarithms; zero where it is not visible.
pub(super) fn left(sums: &Array, earlier: &Array, visible: &Array) -> Result<Array> {
    // Before the exponential: what is not visible may overflow, and then its gradient is NaN.
    let hidden = uploads::float(f32::NEG_INFINITY);
    Ok(exp(select(visible, sums.subtract(earlier)?, hidden)?)?)
}

/// `row` with zeros up to `columns` columns.
fn pad_columns(row: &Array, columns: i32) -> Result<Array> {
    let mut width = vec![(0, 0); row.ndim() - 1];
    width.push((0, columns - row.dim(-1)));
    Ok(pad(row, &width[..], None, None)?)
}

/// `left` where `mask` is true, else zero.
fn masked(left: Array, mask: Option<&Array>) -> Result<Array> {
    match mask {
        Some(mask) => Ok(select(mask, left, uploads::float(0.0))?),
        None => Ok(left),
    }
}

/// The outer products of keys and values, summed over steps, each times what is `left` of it; in the dtype of `values`.
pub(super) fn outer(keys: &Array, values: &Array, left: &Array) -> Result<Array> {
    let dtype = values.dtype();
    let scaled = |array: &Array| Pass::Scaled.run(dtype, &[array.clone(), left.clone()]);
    let (keys, values) = match left.dim(-1) {
        1 => (keys.as_dtype(dtype)?, scaled(values)?),
        _ => (scaled(keys)?, values.clone()),
    };
    Ok(keys.swap_axes(-1, -2)?.matmul(values)?)
}
