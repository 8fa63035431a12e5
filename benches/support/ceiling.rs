//! What the same device, in the same run, takes for the same work and nothing else.

use anyhow::Result;
use mlx_primitives::{
    dispatch::Target,
    kernel::{Argument, Call, File, Kernel, Launch, Plan},
};
use mlx_rs::{Array, Dtype};

use super::{
    case::{Run, Work, mlx, ours},
    inputs::normal,
};

/// Work of a case's kind at the device's best, in some amount.
pub(super) struct Ceiling {
    pub(super) inputs: Vec<Array>,
    pub(super) run: Run,
    /// How many times the work of the case it is.
    pub(super) amount: f64,
}

/// The ceiling for `work` on results of `dtype`.
pub(super) fn of(work: Work, dtype: Dtype, target: Target) -> Result<Ceiling> {
    match work {
        Work::Bytes(bytes) if target == Target::Cpu => copy(bytes),
        Work::Bytes(bytes) => copy_kernel(bytes),
        Work::Flops(flops) => {
            let side = if target == Target::Cpu { 1024 } else { 8192 };
            product(flops, side, dtype)
        }
    }
}

/// Reads half of `bytes` and writes the other half.
///
/// MLX's own copy of an array is no copy at all, so this changes each sign on the way.
fn copy(bytes: usize) -> Result<Ceiling> {
    let elements = i32::try_from(bytes / 8)?.max(1);
    let inputs = vec![normal(0, &[elements], Dtype::Float32)?];
    Ok(Ceiling { inputs, run: mlx(|x| x[0].negative()), amount: 1.0 })
}

/// The same by a kernel of nothing else, launched as ours are.
fn copy_kernel(bytes: usize) -> Result<Ceiling> {
    let elements = i32::try_from(bytes / 8)?.max(1);
    let inputs = vec![normal(0, &[elements], Dtype::Float32)?];
    let groups = elements.unsigned_abs().div_ceil(COPY_GROUP * 4);
    let launch = Launch { groups: [groups, 1, 1], group: [COPY_GROUP, 1, 1], threadgroup_bytes: 0 };
    let run = ours(move |x| {
        let plan = Plan { constants: Vec::new(), extents: Vec::new(), launch };
        let call = Call::new(&COPY, &[&x[0]], plan)?;
        // SAFETY: each thread copies its own four elements, if there are any left.
        Ok(unsafe { call.run_unchecked() }?)
    });
    Ok(Ceiling { inputs, run, amount: 1.0 })
}

static COPY: Kernel = Kernel {
    name: "copy",
    inputs: &[Argument::of("T", "x", &["N"])],
    outputs: &[Argument::of("T", "y", &["N"])],
    constants: &[],
    fragments: &[File::new("common/chunk.metal", include_str!("../../metal/common/chunk.metal"))],
    file: File::new("bench/copy.metal", include_str!("../../metal/bench/copy.metal")),
};

const COPY_GROUP: u32 = 256;

/// Multiplies two matrices that are large enough to keep the device busy.
fn product(flops: f64, side: i32, dtype: Dtype) -> Result<Ceiling> {
    let inputs = vec![normal(0, &[side, side], dtype)?, normal(1, &[side, side], dtype)?];
    let amount = 2.0 * f64::from(side).powi(3) / flops;
    Ok(Ceiling { inputs, run: mlx(|x| x[0].matmul(&x[1])), amount })
}
