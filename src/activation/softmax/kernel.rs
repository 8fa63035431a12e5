//! One pass forward and one back, by kernels of this crate.

use std::f32::consts::LOG2_E;

use mlx_rs::Array;

use super::{Problem, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Plan, Rows, Vjp, differentiable, metal},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

static FORWARD: Kernel = Kernel {
    name: "softmax",
    inputs: &[Argument::of("T", "x", &["N", "D"])],
    outputs: &[Argument::of("T", "y", &["N", "D"])],
    constants: &["SIMDS", "CHUNKS", "TILED", "RATE"],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/row.metal"),
        metal!("common/base.metal"),
    ],
    file: metal!("activation/softmax.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "softmax_backward",
    inputs: &[Argument::of("T", "y", &["N", "D"]), Argument::of("T", "dy", &["N", "D"])],
    outputs: &[Argument::of("T", "dx", &["N", "D"])],
    constants: &["SIMDS", "CHUNKS", "TILED", "SCALE"],
    file: metal!("activation/softmax_backward.metal"),
    ..FORWARD
};

/// What one direction needs.
struct Needs {
    /// The most chunks of an array that a thread keeps; a row that takes more is read twice, tile by tile, the second
    /// time out of a cache. On an NVIDIA GPU that is faster than to keep 8, whose registers leave a core too few groups.
    chunks: i32,
    threadgroup_bytes: u32,
}

const FOR_FORWARD: Needs = Needs { chunks: 4, threadgroup_bytes: 256 };
const FOR_BACKWARD: Needs = Needs { chunks: 4, threadgroup_bytes: 128 };

/// Chunks of a tile.
const TILE: i32 = 4;

pub(super) fn refusal(problem: &Problem) -> Option<&'static str> {
    Rows::refusal(problem.x)
}

pub(super) fn softmax(problem: &Problem) -> Result<Array> {
    let scale = problem.scale;
    let [y] = differentiable(
        [problem.x],
        move |[x]| forward(x, scale),
        move |vjp| backward(vjp, scale),
        move |[x]| Ok([reference::softmax(x, scale)?]),
    )?;
    Ok(y)
}

fn forward(x: &Array, scale: f32) -> Result<[Array; 1]> {
    let rows = in_rows(x)?;
    let [y] = FORWARD.call(&[&rows], plan_forward(&Rows::of(&rows).holding(4), scale))?;
    Ok([y.reshape(x.shape())?])
}

fn backward(vjp: Vjp<'_, 1, 1>, scale: f32) -> Result<[Array; 1]> {
    let ([x], [y], [dy]) = (vjp.inputs, vjp.outputs, vjp.cotangents);
    let (y, dy) = (in_rows(y)?, in_rows(dy)?);
    let [dx] = BACKWARD.call(&[&y, &dy], plan_backward(&Rows::of(&y), scale))?;
    Ok([dx.reshape(x.shape())?])
}

fn in_rows(x: &Array) -> Result<Array> {
    Ok(x.reshape(&[-1, x.dim(-1)])?)
}

fn plan_forward(rows: &Rows, scale: f32) -> Plan {
    // Neither end of the range may turn a difference of zero or of infinity into NaN.
    let rate = (scale * LOG2_E).clamp(f32::MIN_POSITIVE, f32::MAX);
    plan(rows, rate, &FOR_FORWARD)
}

fn plan_backward(rows: &Rows, scale: f32) -> Plan {
    plan(rows, scale, &FOR_BACKWARD)
}

fn plan(rows: &Rows, factor: f32, needs: &Needs) -> Plan {
    let tiled = rows.chunks > needs.chunks;
    let constants = vec![
        Constant::Int(rows.simds),
        Constant::Int(if tiled { TILE } else { rows.chunks }),
        Constant::Bool(tiled),
        Constant::Float(factor),
    ];
    Plan { constants, extents: Vec::new(), launch: rows.launch(needs.threadgroup_bytes) }
}

#[cfg(test)]
mod tests {
    use mlx_rs::Dtype;

    use super::*;

    fn tiling(plan: fn(&Rows, f32) -> Plan, length: i32, dtype: Dtype) -> (Constant, Constant) {
        let constants = plan(&Rows::new(4, length, dtype), 1.0).constants;
        (constants[1], constants[2])
    }

    #[test]
    fn a_row_that_fits_into_registers_is_read_once() {
        let kept = |chunks| (Constant::Int(chunks), Constant::Bool(false));
        assert_eq!(tiling(plan_forward, 8192, Dtype::Bfloat16), kept(4));
        assert_eq!(tiling(plan_forward, 4096, Dtype::Float32), kept(4));
        assert_eq!(tiling(plan_backward, 8192, Dtype::Bfloat16), kept(4));
    }

    #[test]
    fn a_longer_row_is_tiled() {
        let tiled = (Constant::Int(TILE), Constant::Bool(true));
        assert_eq!(tiling(plan_forward, 8193, Dtype::Bfloat16), tiled);
        assert_eq!(tiling(plan_backward, 8193, Dtype::Bfloat16), tiled);
        assert_eq!(tiling(plan_forward, i32::MAX, Dtype::Float32), tiled);
    }

    #[test]
    fn any_scale_keeps_the_rate_finite_and_above_zero() {
        for scale in [1e-45, 1.0, f32::MAX] {
            let plan = plan_forward(&Rows::new(1, 8, Dtype::Float32), scale);
            assert!(matches!(plan.constants[3], Constant::Float(rate) if rate.is_normal()));
        }
    }
}
