//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype};

use super::{GateOrder, Norm, Problem, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Launch, Plan, Rows, Vjp, differentiable, metal},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

static FORWARD: Kernel = Kernel {
    name: "gated_rms_norm",
    inputs: &[
        Argument::of("T", "x", &["N", "K", "D"]),
        Argument::of("T", "gate", &["N", "K", "D"]),
        Argument::of("W", "weight", &["K", "D"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "K", "D"])],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "GATE_FIRST"],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/row.metal"),
        metal!("common/held.metal"),
        metal!("common/curve.metal"),
    ],
    file: metal!("norm/gated_rms_norm.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "gated_rms_norm_backward",
    inputs: &[
        Argument::of("T", "x", &["N", "K", "D"]),
        Argument::of("T", "gate", &["N", "K", "D"]),
        Argument::of("W", "weight", &["K", "D"]),
        Argument::of("T", "dy", &["N", "K", "D"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["N", "K", "D"]),
        Argument::of("T", "dgate", &["N", "K", "D"]),
        Argument::fixed(Dtype::Float32, "dweight", &["R", "K", "D"]),
    ],
    file: metal!("norm/gated_rms_norm_backward.metal"),
    ..FORWARD
};

/// Threadgroup memory: a float for each simdgroup that a group may have.
const FORWARD_BYTES: u32 = 64;

/// Threadgroup memory: two sums in turn, of two floats each.
const BACKWARD_BYTES: u32 = 256;

/// The longest groups that `Auto` gives the kernels: of longer ones a thread would hold more than fits its registers.
const MAX_CHUNKS: i32 = 8;

/// Whether groups of this size are worth a kernel.
pub(super) fn suits(problem: &Problem) -> bool {
    Rows::packed(1, problem.norm.groups[1], problem.x.dtype()).chunks <= MAX_CHUNKS
}

/// Why the kernels cannot take so many groups, if they cannot.
pub(super) fn refusal_of_groups(norm: Norm) -> Option<&'static str> {
    let fits = u32::try_from(norm.groups[0]).is_ok_and(|groups| groups <= Launch::MAX_GROUPS_ASIDE);
    (!fits).then_some("the kernel takes no more than 65535 groups of a row")
}

pub(super) fn gated_rms_norm(problem: &Problem) -> Result<Array> {
    let norm = problem.norm;
    let [y] = differentiable(
        [problem.x, problem.gate, problem.weight],
        move |inputs| Ok([forward(inputs, norm)?]),
        move |vjp| backward(vjp, norm),
        move |[x, gate, weight]| Ok([reference::gated_rms_norm(x, gate, weight, norm)?]),
    )?;
    Ok(y)
}

fn forward([x, gate, weight]: &[Array; 3], norm: Norm) -> Result<Array> {
    let (x3, gate) = (norm.rows_of(x)?, norm.rows_of(gate)?);
    let rows = Rows::packed(x3.dim(0), x3.dim(2), x3.dtype()).holding(4);
    let launch = norm.over_groups(rows.launch(FORWARD_BYTES));
    let plan = Plan { constants: norm.constants(&rows), extents: Vec::new(), launch };
    let [y] = FORWARD.call(&[&x3, &gate, &norm.split(weight)?], plan)?;
    Ok(y.reshape(x.shape())?)
}

fn backward(vjp: Vjp<'_, 3, 1>, norm: Norm) -> Result<[Array; 3]> {
    let ([x, gate, weight], [dy]) = (vjp.inputs, vjp.cotangents);
    let (x3, gate, dy) = (norm.rows_of(x)?, norm.rows_of(gate)?, norm.rows_of(dy)?);
    let rows = Rows::packed(x3.dim(0), x3.dim(2), x3.dtype());
    let workers = rows.workers(x3.dim(1));
    let plan = Plan {
        constants: norm.constants(&rows),
        extents: vec![("R", rows.at_once(workers))],
        launch: norm.over_groups(rows.launch_of(workers, BACKWARD_BYTES)),
    };
    let [dx, dgate, dweight] = BACKWARD.call(&[&x3, &gate, &norm.split(weight)?, &dy], plan)?;
    let dweight = dweight.sum_axis(0, false)?.reshape(weight.shape())?;
    Ok([dx.reshape(x.shape())?, dgate.reshape(x.shape())?, dweight.as_dtype(weight.dtype())?])
}

impl Norm {
    /// `array`, `[..., D]`, as rows of groups.
    fn rows_of(self, array: &Array) -> Result<Array> {
        let [groups, size] = self.groups;
        Ok(array.reshape(&[-1, groups, size])?)
    }

    /// A launch for one group of each row, repeated for each group.
    fn over_groups(self, launch: Launch) -> Launch {
        let [along_rows, ..] = launch.groups;
        Launch { groups: [along_rows, self.groups[0].unsigned_abs(), 1], ..launch }
    }

    fn constants(self, rows: &Rows) -> Vec<Constant> {
        let gate_first = Constant::Bool(self.order == GateOrder::GateThenNorm);
        let own = [Constant::Float(self.eps), gate_first];
        rows.constants().into_iter().chain(own).collect()
    }
}
