//! The reference, a block of queries at a time: no more scores at once than a device works on, and none of keys that a window
//! hides from the whole block. A gradient computes them again, in larger blocks.

use std::{iter, ops::Range};

use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result as MlxResult},
    ops::{concatenate, indexing::TryIndexOp},
};

use super::{
    dims::Dims,
    options::{Segments, Window},
    problem::{Attended, Problem},
    reference,
    visible::with_rank_4,
};
use crate::{
    dispatch::{Target, aside},
    error::Result,
    ffi::{Vjp, accelerated, checkpoint, exactly},
    layout::Layout,
};

/// The scores of a block, in bytes: what stays in a core's cache, or keeps a GPU busy, and is enough for products to be fast.
fn scores(target: Target) -> i64 {
    if target == Target::Cpu { 1 << 21 } else { 1 << 27 }
}

/// The fewest queries of a block.
const FEWEST: i32 = 16;

/// Whether all scores at once would be much more than a block of them, on a device where that is slow.
pub(super) fn pay(problem: &Problem, target: Target) -> bool {
    let bytes = bytes_of_a_query(&problem.dims) * i64::from(problem.dims.query_length);
    let many = problem.dims.query_length > FEWEST && bytes > 8 * scores(target);
    target != Target::Metal && problem.dropout.is_none() && many
}

/// In blocks where that pays, else at once.
pub(super) fn by_reference(problem: &Problem) -> Result<Attended> {
    let target = Target::current()?;
    match pay(problem, target) {
        true => attend(problem, target),
        false => reference::attend(problem),
    }
}

fn attend(problem: &Problem, target: Target) -> Result<Attended> {
    let terms = Terms::of(problem);
    let rows = rows(&problem.dims, target);
    let with_gradient = rows.max(rows_with_gradient(&problem.dims));
    let mut outputs = accelerated(
        &arrays(problem)?,
        move |arrays| Ok(terms.in_blocks(arrays, rows, target, Terms::attend)?),
        None::<fn(Vjp<'_>) -> MlxResult<Vec<Array>>>,
        move |arrays| Ok(terms.in_blocks(arrays, with_gradient, target, Terms::attend_twice)?),
    )?;
    let lse = if problem.wants_lse { outputs.pop() } else { None };
    let [output] = exactly(outputs)?;
    Ok(Attended { output: output.as_dtype(problem.dtype)?, lse })
}

/// Queries, keys and values in f32, and what there is of mask, slopes, sinks and segments.
fn arrays(problem: &Problem) -> Result<Vec<Array>> {
    let Problem { queries, keys, values, mask, alibi_slopes, sinks, segments, dtype, .. } = problem;
    let wide = [queries, keys, values].map(|array| array.as_dtype(Dtype::Float32));
    let mut arrays = wide.into_iter().collect::<MlxResult<Vec<_>>>()?;
    arrays.extend(mask.map(|mask| with_rank_4(mask, *dtype)).transpose()?);
    arrays.extend([*alibi_slopes, *sinks].into_iter().flatten().cloned());
    arrays.extend(segments.iter().flat_map(|of| [of.queries.clone(), of.keys.clone()]));
    Ok(arrays)
}

/// A problem without its arrays.
#[derive(Clone, Copy)]
struct Terms {
    dims: Dims,
    scale: f32,
    soft_cap: Option<f32>,
    window: Window,
    wants_lse: bool,
    layout: Layout,
    has_mask: bool,
    has_slopes: bool,
    has_sinks: bool,
    has_segments: bool,
}

impl Terms {
    fn of(problem: &Problem) -> Self {
        Self {
            dims: problem.dims,
            scale: problem.scale,
            soft_cap: problem.soft_cap,
            window: problem.window,
            wants_lse: problem.wants_lse,
            layout: problem.layout,
            has_mask: problem.mask.is_some(),
            has_slopes: problem.alibi_slopes.is_some(),
            has_sinks: problem.sinks.is_some(),
            has_segments: problem.segments.is_some(),
        }
    }

    /// Result and log-sum-exp, joined from blocks of so many queries, each computed by `attend`.
    fn in_blocks(
        self,
        arrays: &[Array],
        rows: i32,
        target: Target,
        attend: fn(Self, Vec<Array>) -> Result<Vec<Array>>,
    ) -> Result<Vec<Array>> {
        let starts = iter::successors(Some(0), |start| Some(start + rows));
        let starts = starts.take_while(|&start| start < self.dims.query_length).enumerate();
        let blocks = starts.map(|(index, start)| {
            let queries = start..(start + rows).min(self.dims.query_length);
            let (terms, arrays) = self.block(arrays, &queries)?;
            // On a CPU MLX computes all but products on one thread a stream.
            match target == Target::Cpu && index % 2 == 1 {
                true => aside(|| attend(terms, arrays)),
                false => attend(terms, arrays),
            }
        });
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let joined = |which| {
            concatenate(&blocks.iter().filter_map(|block| block.get(which)).collect::<Vec<_>>(), 2)
        };
        Ok((0..1 + usize::from(self.wants_lse)).map(joined).collect::<MlxResult<_>>()?)
    }

    /// What a block of queries is computed from.
    fn block(self, arrays: &[Array], queries: &Range<i32>) -> Result<(Self, Vec<Array>)> {
        // Where segments lie, only their arrays know.
        let keys = match self.has_segments {
            true => 0..self.dims.key_length,
            false => self.dims.keys_of(queries.clone(), self.window),
        };
        let mut block = arrays.to_vec();
        for (index, array) in block.iter_mut().enumerate() {
            *array = match index {
                0 => part(array, 2, queries)?,
                1 | 2 => part(array, 2, &keys)?,
                3 if self.has_mask => part(&part(array, 2, queries)?, 3, &keys)?,
                _ => continue,
            };
        }
        Ok((Self { dims: self.dims.part(queries, &keys), ..self }, block))
    }

    fn attend(self, arrays: Vec<Array>) -> Result<Vec<Array>> {
        let mut rest = arrays[3..].iter();
        let mut next = |has: bool| if has { rest.next() } else { None };
        let [mask, alibi_slopes, sinks] =
            [self.has_mask, self.has_slopes, self.has_sinks].map(&mut next);
        let segments = next(self.has_segments).zip(next(self.has_segments));
        let problem = Problem {
            queries: arrays[0].clone(),
            keys: arrays[1].clone(),
            values: arrays[2].clone(),
            dims: self.dims,
            dtype: Dtype::Float32,
            scale: self.scale,
            soft_cap: self.soft_cap,
            alibi_slopes,
            mask,
            window: self.window,
            segments: segments.map(|(queries, keys)| Segments { queries, keys }),
            sinks,
            dropout: None,
            wants_lse: self.wants_lse,
            layout: self.layout,
        };
        let none = problem.is_empty();
        let attended = if none { problem.nothing() } else { reference::attend(&problem) }?;
        Ok([Some(attended.output), attended.lse].into_iter().flatten().collect())
    }

    /// Keeps nothing for the gradient, but computes it again.
    fn attend_twice(self, arrays: Vec<Array>) -> Result<Vec<Array>> {
        let attend = move |arrays: &[Array]| self.attend(arrays.to_vec()).map_err(Exception::from);
        Ok(checkpoint(attend, arrays)?)
    }
}

/// How many queries a block has.
fn rows(dims: &Dims, target: Target) -> i32 {
    let rows = (scores(target) / bytes_of_a_query(dims)).clamp(FEWEST.into(), i32::MAX.into());
    i32::try_from(rows).unwrap_or(FEWEST).min(dims.query_length)
}

/// The same with a gradient, where each block keeps a handful of copies of its scores, and until all are added up the
/// gradients of its keys and values: in 2·√(S_q / D) blocks, either takes as much.
fn rows_with_gradient(dims: &Dims) -> i32 {
    let blocks = 2.0 * (f64::from(dims.query_length) / f64::from(dims.size)).sqrt();
    (f64::from(dims.query_length) / blocks).ceil() as i32
}

fn bytes_of_a_query(dims: &Dims) -> i64 {
    let [batch, heads, _, keys] = dims.scores().map(i64::from);
    (4 * batch * heads * keys).max(1)
}

/// A range of the second-last or last axis of four, unless one index stands for all.
fn part(array: &Array, axis: i32, range: &Range<i32>) -> Result<Array> {
    let range = range.clone();
    Ok(match (array.dim(axis), axis) {
        (1, _) => array.clone(),
        (_, 2) => array.try_index((.., .., range, ..))?,
        _ => array.try_index((.., .., .., range))?,
    })
}
