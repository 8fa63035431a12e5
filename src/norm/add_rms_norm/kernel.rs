//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype};

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Plan, Rows, Vjp, differentiable, metal},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

static FORWARD: Kernel = Kernel {
    name: "add_rms_norm",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("T", "residual", &["N", "D"]),
        Argument::of("W", "weight", &["D"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "D"]), Argument::of("T", "sum", &["N", "D"])],
    constants: &["SIMDS", "CHUNKS", "EPS", "UNIT_OFFSET"],
    fragments: &[metal!("common/chunk.metal"), metal!("common/row.metal")],
    file: metal!("norm/add_rms_norm.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "add_rms_norm_backward",
    inputs: &[
        Argument::of("T", "sum", &["N", "D"]),
        Argument::of("W", "weight", &["D"]),
        Argument::of("T", "dy", &["N", "D"]),
        Argument::of("T", "dsum", &["N", "D"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["N", "D"]),
        Argument::fixed(Dtype::Float32, "dweight", &["R", "D"]),
    ],
    file: metal!("norm/add_rms_norm_backward.metal"),
    ..FORWARD
};

/// A float for each simdgroup that a group may have, for each sum.
const THREADGROUP_BYTES: u32 = 128;

/// Rows that the backward kernel works on at once: some groups for each of a large GPU's cores, and few enough that
/// adding up their weight gradients costs little.
const WORKERS: i32 = 528;

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
    let rows = x.reshape(&[-1, weight.dim(0)])?;
    let plan = plan_forward(&Rows::of(&rows), scaling);
    let [y, sum] = FORWARD.call(&[&rows, &residual.reshape(rows.shape())?, weight], plan)?;
    Ok([y.reshape(x.shape())?, sum.reshape(x.shape())?])
}

fn backward(vjp: Vjp<'_, 3, 2>, scaling: Scaling) -> Result<[Array; 3]> {
    let ([x, _, weight], [dy, dsum]) = (vjp.inputs, vjp.cotangents);
    let sum = vjp.outputs[1].reshape(&[-1, weight.dim(0)])?;
    let [dy, dsum] = [dy.reshape(sum.shape())?, dsum.reshape(sum.shape())?];
    let plan = plan_backward(&Rows::of(&sum), scaling);
    let [dx, dweight] = BACKWARD.call(&[&sum, weight, &dy, &dsum], plan)?;
    let dx = dx.reshape(x.shape())?;
    let dweight = dweight.sum_axis(0, false)?.as_dtype(weight.dtype())?;
    Ok([dx.clone(), dx, dweight])
}

fn plan_forward(rows: &Rows, scaling: Scaling) -> Plan {
    let launch = rows.launch(THREADGROUP_BYTES);
    Plan { constants: constants(rows, scaling), extents: Vec::new(), launch }
}

fn plan_backward(rows: &Rows, scaling: Scaling) -> Plan {
    let launch = rows.launch_of(WORKERS, 2 * THREADGROUP_BYTES);
    let extents = vec![("R", rows.at_once(WORKERS))];
    Plan { constants: constants(rows, scaling), extents, launch }
}

fn constants(rows: &Rows, scaling: Scaling) -> Vec<Constant> {
    let [simds, chunks] = rows.constants();
    vec![simds, chunks, Constant::Float(scaling.eps), Constant::Bool(scaling.unit_offset)]
}
