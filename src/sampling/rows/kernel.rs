//! One kernel for all of it, without a sort.

use mlx_rs::{Array, Dtype};

use super::{Drawn, Problem};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Launch, Plan, metal},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&SAMPLE];

static SAMPLE: Kernel = Kernel {
    name: "sample_rows",
    inputs: &[
        Argument::of("T", "x", &["N", "V"]),
        Argument::fixed(Dtype::Float32, "rates", &["N"]),
        Argument::fixed(Dtype::Int32, "top_k", &["N"]),
        Argument::fixed(Dtype::Uint64, "spares", &["N"]),
        Argument::fixed(Dtype::Float32, "floors", &["N"]),
        Argument::fixed(Dtype::Uint64, "keys", &["N"]),
        Argument::fixed(Dtype::Int32, "positions", &["N"]),
    ],
    outputs: &[
        Argument::fixed(Dtype::Uint32, "tokens", &["N"]),
        Argument::fixed(Dtype::Float32, "after", &["N"]),
        Argument::fixed(Dtype::Float32, "before", &["N"]),
    ],
    constants: &["SIMDS", "BEFORE"],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/wide.metal"),
        metal!("common/draw_bits.metal"),
        metal!("common/ranked.metal"),
        metal!("common/stretches.metal"),
    ],
    file: metal!("sampling/sample_rows.metal"),
};

/// Simdgroups of a row: all that a core can hold of them, and for a row of few loads, few.
const SIMDS: i32 = 16;
const SIMDS_OF_SHORT_ROWS: i32 = 4;
/// The longest of those, which a group of the fewer reads in 16 loads or less.
const SHORT: i32 = 8192;

const THREADGROUP_BYTES: u32 = 18 * 1024;

pub(super) fn sample(problem: &Problem) -> Result<Drawn> {
    let filters = problem.filters;
    let inputs: [&Array; 7] = [
        problem.logits,
        &filters.rates,
        &filters.top_k,
        &filters.spares,
        &filters.reaches,
        &filters.keys,
        problem.positions,
    ];
    let [rows, length] = [problem.logits.dim(0), problem.logits.dim(1)];
    let [tokens, after, before] = SAMPLE.call(&inputs, plan(rows, length, problem.before))?;
    Ok(Drawn { tokens, after, before })
}

fn plan(rows: i32, length: i32, before: bool) -> Plan {
    let simds = if length <= SHORT { SIMDS_OF_SHORT_ROWS } else { SIMDS };
    let launch = Launch {
        groups: [rows.unsigned_abs(), 1, 1],
        group: [32 * simds.unsigned_abs(), 1, 1],
        threadgroup_bytes: THREADGROUP_BYTES,
    };
    Plan {
        constants: vec![Constant::Int(simds), Constant::Bool(before)],
        extents: Vec::new(),
        launch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    #[test]
    fn every_row_has_a_group_that_any_gpu_can_run() {
        for (rows, length, threads) in [(1, 1, 128), (7, 8192, 128), (32, 128_256, 512)] {
            let launch = plan(rows, length, true).launch;
            assert_eq!((launch.groups[0], launch.group), (rows.unsigned_abs(), [threads, 1, 1]));
            assert!(launch.check("sample_rows", Target::Metal).is_ok(), "{launch:?}");
        }
    }
}
