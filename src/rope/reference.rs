//! The definition, in plain MLX ops.

use std::f64::consts::TAU;

use mlx_rs::{
    Array, Dtype,
    ops::{
        arange, concatenate,
        indexing::{Ellipsis, IntoStrideBy, TryIndexOp},
        stack,
    },
};

use super::{Problem, RopeOffset, RopeStyle};
use crate::error::Result;

pub(super) fn rope(problem: &Problem) -> Result<Array> {
    let dims = problem.dims;
    let angles = angles(problem)?;
    let magnitude = Array::from_f32(problem.frequencies.magnitude as f32);
    let (cos, sin) = (angles.cos()?.multiply(&magnitude)?, angles.sin()?.multiply(&magnitude)?);

    let (a, b) = split(&problem.x.as_dtype(Dtype::Float32)?, dims, problem.style)?;
    let turned_a = a.multiply(&cos)?.subtract(b.multiply(&sin)?)?;
    let turned_b = a.multiply(&sin)?.add(b.multiply(&cos)?)?;
    let turned = join(turned_a, turned_b, problem.style)?.as_dtype(problem.dtype)?;

    if dims == problem.x.shape()[3] {
        return Ok(turned);
    }
    let rest = problem.x.try_index((Ellipsis, dims..))?;
    Ok(concatenate(&[turned, rest], -1)?)
}

/// `[S, dims/2]` or `[B, 1, S, dims/2]`, f32, within half a turn of zero.
///
/// The product of a position and a frequency is taken in whole units of 2⁻⁶⁴ turns, where an integer
/// that wraps around drops exactly the whole turns. In f32 the product itself would round, by
/// 0.004 at position 100 000.
fn angles(problem: &Problem) -> Result<Array> {
    let positions = positions(problem)?.as_dtype(Dtype::Uint64)?.expand_dims(-1)?;
    let turns = positions.multiply(problem.frequencies.turns())?.as_dtype(Dtype::Int64)?;
    let radians_per_unit = Array::from_f32((TAU / 2.0_f64.powi(64)) as f32);
    Ok(turns.as_dtype(Dtype::Float32)?.multiply(radians_per_unit)?)
}

/// `[S]` or `[B, 1, S]`, int64.
fn positions(problem: &Problem) -> Result<Array> {
    let length = i64::from(problem.sequence_length());
    match problem.offset {
        RopeOffset::At(first) => {
            let first = i64::from(first);
            Ok(arange::<i64, i64>(first, first + length, None)?)
        }
        RopeOffset::PerRow(firsts) => {
            let firsts = firsts.as_dtype(Dtype::Int64)?.expand_dims_axes(&[1, 2])?;
            Ok(firsts.add(arange::<i64, i64>(None, length, None)?)?)
        }
    }
}

/// The first and the second elements of all pairs.
fn split(x: &Array, dims: i32, style: RopeStyle) -> Result<(Array, Array)> {
    let half = dims / 2;
    Ok(match style {
        RopeStyle::HalfSplit => {
            (x.try_index((Ellipsis, ..half))?, x.try_index((Ellipsis, half..dims))?)
        }
        RopeStyle::Interleaved => (
            x.try_index((Ellipsis, (0..dims).stride_by(2)))?,
            x.try_index((Ellipsis, (1..dims).stride_by(2)))?,
        ),
    })
}

/// The inverse of [`split`].
fn join(a: Array, b: Array, style: RopeStyle) -> Result<Array> {
    Ok(match style {
        RopeStyle::HalfSplit => concatenate(&[a, b], -1)?,
        RopeStyle::Interleaved => stack(&[a, b], -1)?.flatten(-2, -1)?,
    })
}
