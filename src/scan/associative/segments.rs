//! Sequences of several lengths along the axis.

use mlx_rs::{
    Array, Dtype,
    ops::{arange, clip, concatenate, indexing::TryIndexOp, select},
};

use super::chunked::{Combine, part};
use crate::{error::Result, uploads};

/// Where segments lie along the axis.
pub(in crate::scan) struct Places {
    /// `[L]`: the segment of each element.
    owners: Array,
    /// `[L]`: whether an element is the first of its segment, in the order of the scan.
    pub(in crate::scan) starts: Array,
    /// `[N]`: the last element of each segment, in the order of the scan, or any.
    ends: Array,
    /// `[N]`: whether a segment has no element.
    empty: Array,
}

impl Places {
    /// `bounds`, `[N + 1]`, are where segments begin and end, of at least one element.
    pub(in crate::scan) fn new(bounds: &Array, length: i32, reverse: bool) -> Result<Self> {
        let count = bounds.dim(0) - 1;
        let (begins, ends) = (part(bounds, 0..count)?, part(bounds, 1..count + 1)?);
        let empty = begins.ge(&ends)?;
        let place = arange::<_, i32>(0, length, 1)?.expand_dims(1)?;
        let passed = place.ge(part(bounds, 1..count)?)?.as_dtype(Dtype::Int32)?;
        let owners = passed.sum_axis(-1, false)?.as_dtype(Dtype::Int32)?;
        let changes = part(&owners, 1..length)?.ne(part(&owners, 0..length - 1)?)?;
        let yes = Array::from_bool(true).reshape(&[1])?;
        let (starts, ends) = match reverse {
            true => (concatenate(&[changes, yes], 0)?, begins),
            false => (concatenate(&[yes, changes], 0)?, ends.subtract(uploads::int(1))?),
        };
        let ends = clip(ends, (uploads::int(0), uploads::int(length - 1)))?;
        Ok(Self { owners, starts, ends, empty })
    }

    pub(in crate::scan) fn owners(&self) -> &Array {
        &self.owners
    }

    pub(in crate::scan) fn ends(&self) -> &Array {
        &self.ends
    }

    pub(in crate::scan) fn empty(&self) -> &Array {
        &self.empty
    }

    /// The state that the segment of each element begins with; `states` has one for each along axis 0.
    pub(in crate::scan) fn states(&self, states: &Array) -> Result<Array> {
        Ok(states.try_index(&self.owners)?)
    }

    /// One where the first elements of segments are, the other elsewhere; both count elements along axis 0.
    pub(in crate::scan) fn at_starts(&self, first: &Array, others: &Array) -> Result<Array> {
        Ok(select(beside(&self.starts, others)?, first, others)?)
    }

    /// Of each segment the last of `scanned`, or its state where it is empty.
    pub(in crate::scan) fn last(&self, scanned: &Array, states: &Array) -> Result<Array> {
        let last = scanned.try_index(&self.ends)?;
        Ok(select(beside(&self.empty, &last)?, states, last)?)
    }
}

/// `flags`, `[L]`, such that they broadcast to `array`, `[L, ...]`.
fn beside(flags: &Array, array: &Array) -> Result<Array> {
    let mut shape = vec![1; array.ndim()];
    shape[0] = flags.dim(0);
    Ok(flags.reshape(&shape)?)
}

/// Combines elements of which the last array, `[L]`, says whether they are the first of a segment.
pub(in crate::scan) fn combine(
    first: &[Array],
    second: &[Array],
    inner: Combine,
) -> Result<Vec<Array>> {
    let (Some((after, first)), Some((starts, second))) = (first.split_last(), second.split_last())
    else {
        return Ok(Vec::new());
    };
    // What goes before a first element must not meet it: its infinity times a gradient of zero is NaN.
    let before = first.iter().zip(second);
    let before = before.map(|(first, alone)| Ok(select(beside(starts, alone)?, alone, first)?));
    let joined = inner(&before.collect::<Result<Vec<_>>>()?, second)?;
    let chosen = joined.iter().zip(second);
    let chosen = chosen.map(|(joined, alone)| Ok(select(beside(starts, alone)?, alone, joined)?));
    let flags = starts.logical_or(after)?;
    chosen.chain([Ok(flags)]).collect()
}
