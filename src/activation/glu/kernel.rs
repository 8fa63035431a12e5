//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype, ops::broadcast_to};

use super::{Problem, reference};
use crate::{
    activation::Activation,
    error::Result,
    kernel::{
        self, Argument, Constant, Kernel, Launch, Plan, Vjp, differentiable, metal, stand_in,
    },
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD, &BIASED, &BIASED_BACKWARD];

static FORWARD: Kernel = Kernel {
    name: "glu",
    inputs: &[Argument::of("T", "gate", &["N"]), Argument::of("T", "up", &["N"])],
    outputs: &[Argument::of("T", "y", &["N"])],
    constants: &["KIND", "CHUNKS"],
    fragments: &[metal!("common/chunk.metal"), metal!("common/curve.metal")],
    file: metal!("activation/glu.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "glu_backward",
    inputs: &[
        Argument::of("T", "gate", &["N"]),
        Argument::of("T", "up", &["N"]),
        Argument::of("T", "dy", &["N"]),
    ],
    outputs: &[Argument::of("T", "dgate", &["N"]), Argument::of("T", "dup", &["N"])],
    file: metal!("activation/glu_backward.metal"),
    ..FORWARD
};

static BIASED: Kernel = Kernel {
    name: "glu_biased",
    inputs: &[
        Argument::of("T", "gate", &["N", "F"]),
        Argument::of("T", "up", &["N", "F"]),
        Argument::of("G", "gate_bias", &["F"]),
        Argument::of("U", "up_bias", &["F"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "F"])],
    constants: &["KIND", "ROWS"],
    file: metal!("activation/glu_biased.metal"),
    ..FORWARD
};

static BIASED_BACKWARD: Kernel = Kernel {
    name: "glu_biased_backward",
    inputs: &[
        Argument::of("T", "gate", &["N", "F"]),
        Argument::of("T", "up", &["N", "F"]),
        Argument::of("G", "gate_bias", &["F"]),
        Argument::of("U", "up_bias", &["F"]),
        Argument::of("T", "dy", &["N", "F"]),
    ],
    outputs: &[
        Argument::of("T", "dgate", &["N", "F"]),
        Argument::of("T", "dup", &["N", "F"]),
        Argument::fixed(Dtype::Float32, "dgate_bias", &["R", "F"]),
        Argument::fixed(Dtype::Float32, "dup_bias", &["R", "F"]),
    ],
    file: metal!("activation/glu_biased_backward.metal"),
    ..BIASED
};

/// Chunks of each array that a thread loads at once, in a row or, with biases, in as many rows.
const AT_ONCE: i32 = 2;

/// Threads of a group without biases.
const GROUP: u32 = 256;

/// Threads of a group with biases, along a row and over rows.
const BIASED_GROUP: [u32; 2] = [32, 8];

/// Threads with biases, so far as there are rows for them: as many as a large GPU works on at once, and no more, for each
/// writes gradients of biases of its own.
const THREADS: u32 = 132 * 1024;

pub(super) fn refusal(problem: &Problem) -> Option<&'static str> {
    let gate = problem.gate;
    let uncountable = || i32::try_from(gate.size()).is_err();
    kernel::refusal([gate])
        .or_else(|| uncountable().then_some("the kernel takes fewer than 2^31 elements"))
}

pub(super) fn glu(problem: &Problem) -> Result<Array> {
    let kind = problem.activation;
    let [y] = match problem.biases {
        [None, None] => differentiable(
            [problem.gate, problem.up],
            move |inputs| forward(inputs, kind),
            move |vjp| backward(vjp, kind),
            move |inputs| Ok([reference::glu(kind, inputs)?]),
        ),
        biases => {
            let none = none_like(problem.gate)?;
            let [gate_bias, up_bias] = biases.map(|bias| bias.unwrap_or(&none));
            differentiable(
                [problem.gate, problem.up, gate_bias, up_bias],
                move |inputs| forward_biased(inputs, kind),
                move |vjp| backward_biased(vjp, kind),
                move |inputs| Ok([reference::glu(kind, inputs)?]),
            )
        }
    }?;
    Ok(y)
}

/// A bias of zeros.
fn none_like(gate: &Array) -> Result<Array> {
    Ok(broadcast_to(stand_in(gate.dtype(), 1), &[gate.dim(-1)])?)
}

fn forward([gate, up]: &[Array; 2], kind: Activation) -> Result<[Array; 1]> {
    let (flat, up) = (flat(gate)?, flat(up)?);
    let [y] = FORWARD.call(&[&flat, &up], plan(&flat, kind))?;
    Ok([y.reshape(gate.shape())?])
}

fn backward(vjp: Vjp<'_, 2, 1>, kind: Activation) -> Result<[Array; 2]> {
    let ([gate, up], [dy]) = (vjp.inputs, vjp.cotangents);
    let flats = [flat(gate)?, flat(up)?, flat(dy)?];
    let plan = plan(&flats[0], kind);
    let [dgate, dup] = BACKWARD.call(&flats.each_ref(), plan)?;
    Ok([dgate.reshape(gate.shape())?, dup.reshape(gate.shape())?])
}

fn forward_biased(inputs: &[Array; 4], kind: Activation) -> Result<[Array; 1]> {
    let [gate, up, gate_bias, up_bias] = inputs;
    let (rows, up) = (in_rows(gate)?, in_rows(up)?);
    let (plan, _) = plan_biased(&rows, kind);
    let [y] = BIASED.call(&[&rows, &up, gate_bias, up_bias], plan)?;
    Ok([y.reshape(gate.shape())?])
}

fn backward_biased(vjp: Vjp<'_, 4, 1>, kind: Activation) -> Result<[Array; 4]> {
    let ([gate, up, gate_bias, up_bias], [dy]) = (vjp.inputs, vjp.cotangents);
    let (rows, up, dy) = (in_rows(gate)?, in_rows(up)?, in_rows(dy)?);
    let (plan, workers) = plan_biased(&rows, kind);
    let plan = Plan { extents: vec![("R", workers)], ..plan };
    let [dgate, dup, of_gate, of_up] =
        BIASED_BACKWARD.call(&[&rows, &up, gate_bias, up_bias, &dy], plan)?;
    let total = |parts: Array, bias: &Array| -> Result<Array> {
        Ok(parts.sum_axis(0, false)?.as_dtype(bias.dtype())?)
    };
    Ok([
        dgate.reshape(gate.shape())?,
        dup.reshape(gate.shape())?,
        total(of_gate, gate_bias)?,
        total(of_up, up_bias)?,
    ])
}

fn flat(x: &Array) -> Result<Array> {
    Ok(x.reshape(&[-1])?)
}

fn in_rows(x: &Array) -> Result<Array> {
    Ok(x.reshape(&[-1, x.dim(-1)])?)
}

fn plan(flat: &Array, kind: Activation) -> Plan {
    let length = flat.size().max(1) as u32;
    let groups = length.div_ceil(chunk(flat) * AT_ONCE.unsigned_abs() * GROUP);
    Plan {
        constants: constants(kind),
        extents: Vec::new(),
        launch: Launch { groups: [groups, 1, 1], group: [GROUP, 1, 1], threadgroup_bytes: 0 },
    }
}

/// And the number of workers, who share the rows.
fn plan_biased(matrix: &Array, kind: Activation) -> (Plan, i32) {
    let length = matrix.shape().last().map_or(1, |&length| length.unsigned_abs().max(1));
    let rows = matrix.size().max(1) as u32 / length;
    let [along, over] = BIASED_GROUP;
    let across = length.div_ceil(chunk(matrix) * along);
    let wanted = THREADS.div_ceil(across * along * over);
    let down = wanted.min(rows.div_ceil(over));
    let launch =
        Launch { groups: [across, down, 1], group: [along, over, 1], threadgroup_bytes: 0 };
    let plan = Plan { constants: constants(kind), extents: Vec::new(), launch };
    (plan, (down * over).cast_signed())
}

fn constants(kind: Activation) -> Vec<Constant> {
    vec![Constant::Int(kind as i32), Constant::Int(AT_ONCE)]
}

/// Elements of 16 bytes.
fn chunk(x: &Array) -> u32 {
    if x.dtype() == Dtype::Float32 { 4 } else { 8 }
}

#[cfg(test)]
mod tests {
    use mlx_rs::ops::zeros_dtype;

    use super::*;
    use crate::target::Target;

    fn zeros(shape: &[i32], dtype: Dtype) -> Array {
        zeros_dtype(shape, dtype).unwrap_or_else(|_| Array::from_f32(0.0))
    }

    #[test]
    fn every_element_has_a_thread() {
        for (dtype, size) in [(Dtype::Float32, 4), (Dtype::Bfloat16, 8)] {
            for length in [1, 7, 2048, 4096, 4097, 16384 * 4096, i32::MAX] {
                let launch = plan(&zeros(&[length], dtype), Activation::Silu).launch;
                assert!(launch.check("glu", Target::Metal).is_ok(), "{launch:?}");
                let held = u64::from(launch.grid()[0]) * size * 2;
                assert!(held >= length.unsigned_abs().into(), "{launch:?} for {length}");
            }
        }
    }

    #[test]
    fn workers_are_no_more_than_there_are_rows_for() {
        let workers = |shape: &[i32]| {
            let (plan, workers) = plan_biased(&zeros(shape, Dtype::Bfloat16), Activation::Silu);
            assert!(plan.launch.check("glu", Target::Metal).is_ok(), "{plan:?}");
            (plan.launch.groups, workers)
        };
        assert_eq!(workers(&[1, 9]), ([1, 1, 1], 8));
        assert_eq!(workers(&[9, 9]), ([1, 2, 1], 16));
        assert_eq!(workers(&[16384, 4096]), ([16, 33, 1], 264));
        assert_eq!(workers(&[1 << 24, 64]), ([1, 528, 1], 4224));
        assert_eq!(workers(&[1, i32::MAX]), ([8_388_608, 1, 1], 8));
    }
}
