//! What every linear attention does once it has its features.

use mlx_rs::{
    Array, Dtype,
    ops::{
        concatenate,
        indexing::{Ellipsis, TryIndexOp},
        maximum, ones, select, tri, zeros, zeros_dtype,
    },
    stop_gradient,
};

use super::state::{LinearAttentionState, nothing};
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout, uploads};

/// What stands for a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The feature, not below zero.
    Plain,
    /// The number whose exponential it is.
    Exponents,
}

/// Options that every linear attention has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Common<'a> {
    pub(super) causal: bool,
    pub(super) eps: f32,
    pub(super) chunk_size: i32,
    pub(super) state: Option<&'a LinearAttentionState>,
    pub(super) layout: Layout,
}

impl Common<'_> {
    pub(super) fn check(&self, check: Check) -> Result<()> {
        check.non_negative("eps", self.eps)?;
        check.at_least("chunk_size", self.chunk_size, 1)
    }
}

/// A checked call, with features instead of queries and keys.
pub(super) struct Sequence<'a> {
    pub(super) check: Check,
    pub(super) heads: Heads,
    pub(super) kind: Kind,
    /// `[B, H, S_q, M]`, f32.
    pub(super) queries: Array,
    /// `[B, H_kv, S_kv, M]`, f32.
    pub(super) keys: Array,
    /// In the layout and the dtype of the caller.
    pub(super) values: &'a Array,
}

impl Sequence<'_> {
    pub(super) fn attend(self, common: Common) -> Result<(Array, LinearAttentionState)> {
        let (heads, kind, features) = (self.heads, self.kind, self.keys.dim(-1));
        if let Some(state) = common.state {
            state.check(self.check, &heads, features, kind)?;
        }
        let start = match common.state {
            Some(state) => state.to_running()?,
            None => nothing(&heads, features, kind)?,
        };
        let (sums, end) = match heads.batch == 0 || heads.kv_heads == 0 {
            true => (None, start),
            false => self.split(common.layout)?.run(start, &common)?,
        };
        let state = LinearAttentionState::from_running(&end, heads.value_size)?;
        let shape = [heads.batch, heads.heads, heads.query_length, heads.value_size];
        let attended = match sums {
            Some(sums) if !shape.contains(&0) => {
                averages(&sums, heads.value_size, common.eps)?.reshape(&shape)?
            }
            _ => zeros::<f32>(&shape)?,
        };
        let attended = common.layout.swap_with_bhsd(&attended.as_dtype(heads.dtype)?)?;
        Ok((attended, state))
    }

    /// Heads by group, and a last column of ones to the values: its sums are the normalizers.
    fn split(self, layout: Layout) -> Result<Split> {
        let Heads { batch, heads, kv_heads, query_length, key_length, .. } = self.heads;
        let values = layout.swap_with_bhsd(self.values)?.as_dtype(Dtype::Float32)?;
        let one = ones::<f32>(&[batch, kv_heads, key_length, 1])?;
        let grouped = [batch, kv_heads, heads / kv_heads, query_length, self.queries.dim(-1)];
        Ok(Split {
            queries: self.queries.reshape(&grouped)?,
            keys: self.keys.expand_dims(2)?,
            values: concatenate(&[values, one], -1)?.expand_dims(2)?,
        })
    }
}

/// `[B, H_kv, H / H_kv or 1, S, ...]` each.
struct Split {
    queries: Array,
    keys: Array,
    values: Array,
}

impl Split {
    /// The sums that each query reads, `[B, H_kv, H / H_kv, S_q, D_v + 1]`, and those after the last key.
    fn run(&self, start: Running, common: &Common) -> Result<(Option<Array>, Running)> {
        let (rows, columns) = (self.queries.dim(-2), self.keys.dim(-2));
        if !common.causal {
            let end = start.absorb(self, 0..columns)?;
            return Ok((Some(end.read(&self.queries)?), end));
        }
        let hidden_from = (rows - columns).max(0);
        let seen_by_all = (columns - rows).max(0);
        let mut read = Vec::new();
        if hidden_from > 0 {
            read.push(start.read(&part(&self.queries, 0..hidden_from)?)?);
        }
        let mut running = start.absorb(self, 0..seen_by_all)?;
        for begin in (seen_by_all..columns).step_by(common.chunk_size as usize) {
            let end = columns.min(begin.saturating_add(common.chunk_size));
            let (sums, next) = running.chunk(self, begin..end, hidden_from - seen_by_all)?;
            read.push(sums);
            running = next;
        }
        let read = if read.is_empty() { None } else { Some(concatenate(&read, -2)?) };
        Ok((read, running))
    }
}

fn part(array: &Array, range: std::ops::Range<i32>) -> Result<Array> {
    Ok(array.try_index((Ellipsis, range, ..))?)
}

/// The sums over the keys so far.
#[derive(Debug, Clone)]
pub(super) struct Running {
    /// `[B, H_kv, 1, M, D_v + 1]`: each feature times each value, and in the last column times one.
    pub(super) sums: Array,
    /// `[B, H_kv, 1, 1, M]`: for exponents, the largest of each feature. The sums are divided by its exponential.
    pub(super) peaks: Option<Array>,
}

impl Running {
    fn absorb(self, split: &Split, range: std::ops::Range<i32>) -> Result<Self> {
        if range.is_empty() {
            return Ok(self);
        }
        let (raised, keys) = self.raise(&part(&split.keys, range.clone())?)?;
        raised.add(&keys, &part(&split.values, range)?)
    }

    /// Reads for queries and absorbs keys that stand `lead` before them, as many as there are of them.
    fn chunk(
        &self,
        split: &Split,
        range: std::ops::Range<i32>,
        lead: i32,
    ) -> Result<(Array, Self)> {
        let queries = part(&split.queries, range.start + lead..range.end + lead)?;
        let values = part(&split.values, range.clone())?;
        let (raised, keys) = self.raise(&part(&split.keys, range)?)?;
        let queries = raised.features(&queries)?;
        let weights = queries.matmul(keys.swap_axes(-1, -2)?)?;
        let past = tri::<bool>(keys.dim(-2), None, None)?;
        let own = select(past, weights, uploads::float(0.0))?.matmul(&values)?;
        Ok((queries.matmul(&raised.sums)?.add(own)?, raised.add(&keys, &values)?))
    }

    fn read(&self, queries: &Array) -> Result<Array> {
        if queries.size() == 0 {
            let shape = [&queries.shape()[..4], &[self.sums.dim(-1)]].concat();
            return Ok(zeros_dtype(&shape, Dtype::Float32)?);
        }
        Ok(self.features(queries)?.matmul(&self.sums)?)
    }

    /// Makes room for these keys, and gives their features.
    fn raise(&self, keys: &Array) -> Result<(Self, Array)> {
        let Some(peaks) = &self.peaks else { return Ok((self.clone(), keys.clone())) };
        // Where the new peaks stand changes no result, so no gradient comes from them.
        let raised = stop_gradient(maximum(peaks, keys.max_axis(-2, true)?)?)?;
        let fade = peaks.subtract(&raised)?.exp()?;
        let sums = self.sums.multiply(fade.swap_axes(-1, -2)?)?;
        let features = keys.subtract(&raised)?.exp()?;
        Ok((Self { sums, peaks: Some(raised) }, features))
    }

    fn add(self, keys: &Array, values: &Array) -> Result<Self> {
        let added = keys.swap_axes(-1, -2)?.matmul(values)?;
        Ok(Self { sums: self.sums.add(added)?, ..self })
    }

    /// Of queries: up to a factor of their own each, which the normalizer has too.
    fn features(&self, queries: &Array) -> Result<Array> {
        let Some(peaks) = &self.peaks else { return Ok(queries.clone()) };
        let exponents = queries.add(peaks)?;
        let largest = stop_gradient(exponents.max_axis(-1, true)?)?;
        Ok(exponents.subtract(largest)?.exp()?)
    }
}

/// The sums over the normalizers; zero where nothing weighs anything, and NaN where a weight is.
fn averages(sums: &Array, value_size: i32, eps: f32) -> Result<Array> {
    let weight = sums.try_index((Ellipsis, value_size..))?.add(uploads::float(eps))?;
    let weighs = weight.le(uploads::float(0.0))?.logical_not()?;
    let safe = select(&weighs, weight, uploads::float(1.0))?;
    let averages = sums.try_index((Ellipsis, ..value_size))?.divide(safe)?;
    Ok(select(weighs, averages, uploads::float(0.0))?)
}
