//! Scans in plain MLX ops: chunks side by side, step by step.
//!
//! A loop over time does the least work, and on long rows it is the fastest. Where rows are short, time is cut into
//! chunks that are scanned side by side; a scan of their totals then gives what comes before each. That is two
//! combinations an element, where doubling takes one for each power of two in the length.

use std::ops::Range;

use mlx_rs::{
    Array,
    ops::{concatenate, indexing::TryIndexOp, stack},
};

use crate::{
    dispatch::{Context, Target},
    error::Result,
};

/// Combines pairs of elements, along axis 0.
pub(super) type Combine<'a> = &'a dyn Fn(&[Array], &[Array]) -> Result<Vec<Array>>;

/// The fewest steps of a chunk: more chunks have more totals to scan.
const LEAST_STEPS: i32 = 16;

/// The least numbers that a step should work on, for its work to outweigh its overhead.
fn worth_a_step() -> Result<usize> {
    Ok(match Context::current()?.target {
        Target::Cpu => 1 << 14,
        Target::Metal | Target::Cuda => 1 << 20,
    })
}

/// Scans elements, counted along axis 0.
#[derive(Clone, Copy)]
pub(super) struct Scanner<'a> {
    pub(super) combine: Combine<'a>,
    /// Whether the last element comes first. Steps are taken in another order then, and nothing is turned round: MLX's
    /// CPU back end mistakes some reversed views for contiguous ones.
    pub(super) reverse: bool,
}

impl Scanner<'_> {
    /// All elements from `start` to each one, combined; `start` holds one.
    pub(super) fn scan(self, elements: &[Array], start: &[Array]) -> Result<Vec<Array>> {
        let Some(first) = elements.first() else { return Ok(Vec::new()) };
        let length = first.dim(0);
        let size = elements.iter().map(Array::size).max().unwrap_or(0);
        let chunks = chunks(length, size, worth_a_step()?);
        if chunks <= 1 {
            return self.one_by_one(elements, start);
        }
        let steps = length / chunks;
        let (inside, rest) = cut(self.reverse, 0..length, chunks * steps);
        let local = self.local(&all(elements, inside)?, chunks, steps)?;
        let totals = if self.reverse { local.first() } else { local.last() };
        let carried = self.scan(totals.map_or(&[][..], |totals| totals), start)?;
        let (before, after) = cut(self.reverse, 0..chunks, chunks - 1);
        let before = self.concatenated(start, &all(&carried, before)?)?;
        let steps = local.iter().map(|step| (self.combine)(&before, step));
        let steps = steps.collect::<Result<Vec<_>>>()?;
        let scanned = gather(&steps, |columns| Ok(stack(columns, 1)?.flatten(0, 1)?))?;
        if rest.is_empty() {
            return Ok(scanned);
        }
        let rest = self.one_by_one(&all(elements, rest)?, &all(&carried, after)?)?;
        self.concatenated(&scanned, &rest)
    }

    /// `first` and `second` in the order of the scan, in one array each.
    pub(super) fn concatenated(self, first: &[Array], second: &[Array]) -> Result<Vec<Array>> {
        let pairs = first.iter().zip(second);
        pairs.map(|(first, second)| joined(self.reverse, first, second)).collect()
    }

    /// Each chunk scanned by itself: for each step of all chunks, what is combined so far.
    fn local(self, elements: &[Array], chunks: i32, steps: i32) -> Result<Vec<Vec<Array>>> {
        let columns = elements.iter().map(|array| {
            let shape = [&[chunks, steps], &array.shape()[1..]].concat();
            // A step of all chunks in a row, for operations on it to be quick.
            let columns = array.reshape(&shape)?.swap_axes(0, 1)?.contiguous()?;
            let columns = columns.split_equal(steps, 0)?;
            let columns = columns.iter().map(|column| column.squeeze_axes(&[0]));
            Ok(columns.collect::<Result<Vec<_>, _>>()?)
        });
        self.run(&columns.collect::<Result<Vec<_>>>()?, None)
    }

    fn one_by_one(self, elements: &[Array], start: &[Array]) -> Result<Vec<Array>> {
        let steps = elements.iter().map(|array| Ok(array.split_equal(array.dim(0), 0)?));
        let scanned = self.run(&steps.collect::<Result<Vec<_>>>()?, Some(start))?;
        gather(&scanned, |steps| Ok(concatenate(steps, 0)?))
    }

    /// Combines the steps of all arrays, of which each is given with its own.
    fn run(self, arrays: &[Vec<Array>], start: Option<&[Array]>) -> Result<Vec<Vec<Array>>> {
        let count = arrays.iter().map(Vec::len).min().unwrap_or(0);
        let mut scanned: Vec<Vec<Array>> = Vec::with_capacity(count);
        for number in 0..count {
            let step = if self.reverse { count - 1 - number } else { number };
            let step = arrays.iter().map(|steps| steps[step].clone()).collect::<Vec<_>>();
            let next = match scanned.last().map(|before| &before[..]).or(start) {
                Some(before) => (self.combine)(before, &step)?,
                None => step,
            };
            scanned.push(next);
        }
        if self.reverse {
            scanned.reverse();
        }
        Ok(scanned)
    }
}

/// How many chunks `length` steps of `size` numbers are cut into, so that a step works on `worth` of them or more.
fn chunks(length: i32, size: usize, worth: usize) -> i32 {
    let steps = i32::try_from(size / worth).unwrap_or(i32::MAX).max(LEAST_STEPS);
    length / steps
}

/// The first `count` elements in the order of a scan, and the others.
pub(super) fn cut(reverse: bool, range: Range<i32>, count: i32) -> (Range<i32>, Range<i32>) {
    let Range { start, end } = range;
    match reverse {
        true => (end - count..end, start..end - count),
        false => (start..start + count, start + count..end),
    }
}

/// `first` and `second` in the order of a scan.
pub(super) fn joined(reverse: bool, first: &Array, second: &Array) -> Result<Array> {
    let in_memory = if reverse { [second, first] } else { [first, second] };
    Ok(concatenate(&in_memory, 0)?)
}

/// Joins the steps of each array.
fn gather(steps: &[Vec<Array>], join: impl Fn(&[&Array]) -> Result<Array>) -> Result<Vec<Array>> {
    let count = steps.first().map_or(0, Vec::len);
    (0..count).map(|i| join(&steps.iter().map(|step| &step[i]).collect::<Vec<_>>())).collect()
}

/// The elements in `range`.
pub(super) fn part(array: &Array, range: Range<i32>) -> Result<Array> {
    Ok(array.try_index(range)?)
}

/// The elements in `range` of each array.
pub(super) fn all(arrays: &[Array], range: Range<i32>) -> Result<Vec<Array>> {
    arrays.iter().map(|array| part(array, range.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_rows_are_cut_into_chunks_and_long_ones_are_not() {
        assert_eq!(chunks(65536, 65536, 1 << 14), 4096);
        assert_eq!(chunks(65536, 65536 * 512, 1 << 14), 32);
        assert_eq!(chunks(2048, 2048 * 16384, 1 << 14), 1);
        assert_eq!(chunks(2048, 2048 * 65536, 1 << 14), 0);
        assert_eq!(chunks(31, 31, 1 << 14), 1);
        assert_eq!(chunks(0, 0, 1 << 14), 0);
    }
}
