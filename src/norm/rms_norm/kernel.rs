//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype};

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, File, Kernel, Plan, Rows, differentiable, metal, stand_in},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

/// What every kernel of this norm is made of.
pub(in crate::norm) const FRAGMENTS: &[File] = &[
    metal!("common/chunk.metal"),
    metal!("common/row.metal"),
    metal!("common/held.metal"),
    metal!("common/rms.metal"),
];

static FORWARD: Kernel = Kernel {
    name: "rms_norm",
    inputs: &[Argument::of("T", "x", &["N", "D"]), Argument::of("W", "weight", &["P"])],
    outputs: &[Argument::of("T", "y", &["N", "D"])],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "UNIT_OFFSET", "WEIGHTED"],
    fragments: FRAGMENTS,
    file: metal!("norm/rms_norm.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "rms_norm_backward",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("W", "weight", &["P"]),
        Argument::of("T", "dy", &["N", "D"]),
        Argument::of("T", "dsum", &["N", "D"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["N", "D"]),
        Argument::fixed(Dtype::Float32, "dweight", &["R", "P"]),
    ],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "UNIT_OFFSET", "WEIGHTED", "ADDED"],
    fragments: FRAGMENTS,
    file: metal!("norm/rms_norm_backward.metal"),
};

/// Threadgroup memory of the forward kernels: a float for each simdgroup that a group may have.
pub(in crate::norm) const FORWARD_BYTES: u32 = 64;

/// And of the backward kernels: two sums in turn, of two floats each.
const BACKWARD_BYTES: u32 = 256;

pub(super) fn rms_norm(problem: &Problem) -> Result<Array> {
    let (scaling, weighted) = (problem.scaling, problem.weight.is_some());
    let weight = problem.weight.cloned().unwrap_or_else(stand_in);
    let [y] = differentiable(
        [problem.x, &weight],
        move |[x, weight]| Ok([forward(x, weight, weighted, scaling)?]),
        move |vjp| {
            let ([x, weight], [dy]) = (vjp.inputs, vjp.cotangents);
            gradient(Gradient { x, weight, weighted, dy, dsum: None, scaling })
        },
        move |[x, weight]| Ok([reference::rms_norm(x, weighted.then_some(weight), scaling)?]),
    )?;
    Ok(y)
}

fn forward(x: &Array, weight: &Array, weighted: bool, scaling: Scaling) -> Result<Array> {
    let matrix = x.reshape(&[-1, x.dim(-1)])?;
    let rows = Rows::packed(matrix.dim(0), matrix.dim(1), matrix.dtype()).holding(8);
    let constants = scaling.constants(&rows, [weighted]);
    let plan = Plan { constants, extents: Vec::new(), launch: rows.launch(FORWARD_BYTES) };
    let [y] = FORWARD.call(&[&matrix, weight], plan)?;
    Ok(y.reshape(x.shape())?)
}

impl Scaling {
    /// The constants of a kernel: those of its rows, of the scaling, and `flags`.
    pub(in crate::norm) fn constants<const N: usize>(
        self,
        rows: &Rows,
        flags: [bool; N],
    ) -> Vec<Constant> {
        let own = [Constant::Float(self.eps), Constant::Bool(self.unit_offset)];
        let flags = flags.map(Constant::Bool);
        rows.constants().into_iter().chain(own).chain(flags).collect()
    }
}

/// What the gradient of this norm is computed from.
pub(in crate::norm) struct Gradient<'a> {
    /// What was normalized.
    pub(in crate::norm) x: &'a Array,
    pub(in crate::norm) weight: &'a Array,
    pub(in crate::norm) weighted: bool,
    /// The gradient of the result.
    pub(in crate::norm) dy: &'a Array,
    /// The gradient of `x` by other ways, where there are any.
    pub(in crate::norm) dsum: Option<&'a Array>,
    pub(in crate::norm) scaling: Scaling,
}

/// The gradients of `x` and `weight`.
pub(in crate::norm) fn gradient(of: Gradient) -> Result<[Array; 2]> {
    let dims = of.x.dim(-1);
    let matrix = of.x.reshape(&[-1, dims])?;
    let dy = of.dy.reshape(&[-1, dims])?;
    let dsum = of.dsum.map(|dsum| dsum.reshape(&[-1, dims])).transpose()?;
    let rows = Rows::packed(matrix.dim(0), dims, matrix.dtype());
    let plan = plan_backward(&rows, &of);
    let inputs = [&matrix, of.weight, &dy, dsum.as_ref().unwrap_or(&dy)];
    let [dx, dweight] = BACKWARD.call(&inputs, plan)?;
    let dweight = dweight.sum_axis(0, false)?.reshape(of.weight.shape())?;
    Ok([dx.reshape(of.x.shape())?, dweight.as_dtype(of.weight.dtype())?])
}

fn plan_backward(rows: &Rows, of: &Gradient) -> Plan {
    let workers = rows.workers(1);
    let constants = of.scaling.constants(rows, [of.weighted, of.dsum.is_some()]);
    let extents = vec![("R", rows.at_once(workers))];
    Plan { constants, extents, launch: rows.launch_of(workers, BACKWARD_BYTES) }
}
