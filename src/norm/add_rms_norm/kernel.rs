//! One pass by a kernel of this crate; the way back is MLX's, which no kernel was measured to beat.

use mlx_rs::Array;

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    kernel::{Argument, Kernel, Plan, Rows, Vjp, differentiable, metal},
    norm::rms_norm::kernel::{FORWARD_BYTES, FRAGMENTS, gradient},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD];

static FORWARD: Kernel = Kernel {
    name: "add_rms_norm",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("T", "residual", &["N", "D"]),
        Argument::of("W", "weight", &["D"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "D"]), Argument::of("T", "sum", &["N", "D"])],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "UNIT_OFFSET"],
    fragments: FRAGMENTS,
    file: metal!("norm/add_rms_norm.metal"),
};

pub(super) fn add_rms_norm(problem: &Problem) -> Result<[Array; 2]> {
    let scaling = problem.scaling;
    differentiable(
        [problem.x, problem.residual, problem.weight],
        move |inputs| forward(inputs, scaling),
        move |vjp| backward(vjp, scaling),
        move |[x, residual, weight]| reference::add_rms_norm(x, residual, weight, scaling),
    )
}

fn forward([x, residual, weight]: &[Array; 3], scaling: Scaling) -> Result<[Array; 2]> {
    let matrix = x.reshape(&[-1, weight.dim(0)])?;
    let rows = Rows::packed(matrix.dim(0), matrix.dim(1), matrix.dtype()).holding(4);
    let constants = scaling.constants(&rows, []);
    let plan = Plan { constants, extents: Vec::new(), launch: rows.launch(FORWARD_BYTES) };
    let [y, sum] = FORWARD.call(&[&matrix, &residual.reshape(matrix.shape())?, weight], plan)?;
    Ok([y.reshape(x.shape())?, sum.reshape(x.shape())?])
}

fn backward(vjp: Vjp<'_, 3, 2>, scaling: Scaling) -> Result<[Array; 3]> {
    let ([_, _, weight], [_, sum], [dy, dsum]) = (vjp.inputs, vjp.outputs, vjp.cotangents);
    let [dnormed, dweight] = gradient([sum, weight], true, dy, scaling)?;
    let dx = dnormed.add(dsum)?;
    Ok([dx.clone(), dx, dweight])
}
