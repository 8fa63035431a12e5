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

use super::{RopeOffset, RopeStyle, turning::Turning};
use crate::{error::Result, uploads};

/// Rotates `x`, `[B, H, S, D]`.
pub(super) fn rope(x: &Array, offset: RopeOffset, turning: &Turning) -> Result<Array> {
    let dims = turning.dims;
    let angles = angles(x.dim(2), offset, turning)?;
    let magnitude = uploads::float(turning.frequencies.magnitude as f32);
    let (cos, sin) = (angles.cos()?.multiply(&magnitude)?, angles.sin()?.multiply(&magnitude)?);

    let (a, b) = split(&x.as_dtype(Dtype::Float32)?, dims, turning.style)?;
    let turned_a = a.multiply(&cos)?.subtract(b.multiply(&sin)?)?;
    let turned_b = a.multiply(&sin)?.add(b.multiply(&cos)?)?;
    let turned = join(turned_a, turned_b, turning.style)?.as_dtype(x.dtype())?;

    if dims == x.dim(3) {
        return Ok(turned);
    }
    let rest = x.try_index((Ellipsis, dims..))?;
    Ok(concatenate(&[turned, rest], -1)?)
}

/// `[S, dims/2]` or `[B, 1, S, dims/2]`, f32, within half a turn of zero.
///
/// The product of a position and a frequency is taken in whole units of 2⁻⁶⁴ turns, where an integer
/// that wraps around drops exactly the whole turns. In f32 the product itself would round, by
/// 0.004 at position 100 000.
fn angles(steps: i32, offset: RopeOffset, turning: &Turning) -> Result<Array> {
    let positions = positions(steps, offset)?.as_dtype(Dtype::Uint64)?.expand_dims(-1)?;
    let turns = positions.multiply(turning.frequencies.turns())?.as_dtype(Dtype::Int64)?;
    let radians_per_unit = uploads::float((TAU / 2.0_f64.powi(64)) as f32);
    Ok(turns.as_dtype(Dtype::Float32)?.multiply(radians_per_unit)?)
}

/// `[S]` or `[B, 1, S]`, int64.
fn positions(steps: i32, offset: RopeOffset) -> Result<Array> {
    let steps = i64::from(steps);
    match offset {
        RopeOffset::At(first) => {
            let first = i64::from(first);
            Ok(arange::<i64, i64>(first, first + steps, None)?)
        }
        RopeOffset::PerRow(firsts) => {
            let firsts = firsts.as_dtype(Dtype::Int64)?.expand_dims_axes(&[1, 2])?;
            Ok(firsts.add(arange::<i64, i64>(None, steps, None)?)?)
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
