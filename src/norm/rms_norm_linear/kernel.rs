//! One pass over the weight for one row, by a kernel of this crate.

use mlx_rs::Array;

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Launch, Plan, differentiable_by_reference, metal},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD];

static FORWARD: Kernel = Kernel {
    name: "rms_norm_linear",
    inputs: &[
        Argument::of("T", "x", &["I"]),
        Argument::of("N", "norm_weight", &["I"]),
        Argument::of("T", "weight", &["O", "I"]),
        Argument::of("B", "bias", &["P"]),
    ],
    outputs: &[Argument::of("T", "y", &["O"])],
    constants: &["ROWS", "DEPTH", "EPS", "UNIT_OFFSET", "BIASED"],
    fragments: &[metal!("common/chunk.metal")],
    file: metal!("norm/rms_norm_linear.metal"),
};

pub(super) fn rms_norm_linear(problem: &Problem) -> Result<Array> {
    let (Problem { x, norm_weight, weight, .. }, scaling) = (problem, problem.scaling);
    let [y] = match problem.bias {
        None => differentiable_by_reference(
            [x, norm_weight, weight],
            move |[x, norm, weight]| Ok([forward(x, norm, weight, None, scaling)?]),
            move |[x, norm, weight]| {
                Ok([reference::rms_norm_linear(x, norm, weight, None, scaling)?])
            },
        )?,
        Some(bias) => differentiable_by_reference(
            [x, norm_weight, weight, bias],
            move |[x, norm, weight, bias]| Ok([forward(x, norm, weight, Some(bias), scaling)?]),
            move |[x, norm, weight, bias]| {
                Ok([reference::rms_norm_linear(x, norm, weight, Some(bias), scaling)?])
            },
        )?,
    };
    Ok(y)
}

fn forward(
    x: &Array,
    norm_weight: &Array,
    weight: &Array,
    bias: Option<&Array>,
    scaling: Scaling,
) -> Result<Array> {
    let row = x.reshape(&[-1])?;
    // Where there is no bias, its place is taken by what is at hand.
    let inputs = [&row, norm_weight, weight, bias.unwrap_or(&row)];
    let [y] = FORWARD.call(&inputs, plan(weight.dim(0), bias.is_some(), scaling))?;
    let (_, leading) = x.shape().split_last().unwrap_or((&0, &[]));
    Ok(y.reshape(&[leading, &[weight.dim(0)]].concat())?)
}

/// Chunks of 16 bytes that a lane has in flight: with the few simdgroups that one row has work for, enough to keep a
/// large GPU's memory busy, and few enough for its registers.
const LOADS: i32 = 8;

/// The most outputs of one simdgroup: they share what it makes of `x`.
const MAX_ROWS: i32 = 4;

/// Simdgroups that there should be, even if each has fewer outputs then: some for each of a large GPU's cores.
const WANTED: i32 = 2048;

/// The most outputs, so that MLX can count the threads.
pub(super) const MAX_OUTPUTS: i32 = 1 << 27;

/// Simdgroups of a group: few, so that groups spread evenly over cores.
const SIMDS: u32 = 4;

fn plan(outputs: i32, biased: bool, scaling: Scaling) -> Plan {
    let rows = rows_per_simdgroup(outputs);
    let simdgroups = (outputs.max(1) as u32).div_ceil(rows as u32);
    Plan {
        constants: vec![
            Constant::Int(rows),
            Constant::Int(LOADS / rows),
            Constant::Float(scaling.eps),
            Constant::Bool(scaling.unit_offset),
            Constant::Bool(biased),
        ],
        extents: Vec::new(),
        launch: Launch {
            groups: [simdgroups.div_ceil(SIMDS), 1, 1],
            group: [32 * SIMDS, 1, 1],
            threadgroup_bytes: 0,
        },
    }
}

fn rows_per_simdgroup(outputs: i32) -> i32 {
    let mut rows = MAX_ROWS;
    while rows > 1 && outputs / rows < WANTED {
        rows /= 2;
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    const SCALING: Scaling = Scaling { eps: 1e-5, unit_offset: false };

    #[test]
    fn every_output_has_a_simdgroup() {
        for outputs in
            [1, 2, 3, 63, 2047, 2048, 4095, 4096, 4097, 8192, 14336, 128_256, MAX_OUTPUTS]
        {
            let launch = plan(outputs, false, SCALING).launch;
            assert!(launch.check("rms_norm_linear", Target::Metal).is_ok(), "{launch:?}");
            let simdgroups = i64::from(launch.groups[0]) * i64::from(SIMDS);
            let covered = simdgroups * i64::from(rows_per_simdgroup(outputs));
            assert!(covered >= i64::from(outputs), "{launch:?} for {outputs}");
        }
    }

    #[test]
    fn simdgroups_share_out_few_outputs_and_each_take_several_of_many() {
        assert_eq!(
            [1, 4095, 4096, 8191, 8192, 128_256].map(rows_per_simdgroup),
            [1, 1, 2, 2, 4, 4]
        );
    }
}
