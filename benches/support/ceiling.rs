//! What the same device, in the same run, takes for the same work and nothing else.

use anyhow::Result;
use mlx_primitives::dispatch::Target;
use mlx_rs::{Array, Dtype};

use super::{
    case::{Run, Work, mlx},
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
        Work::Bytes(bytes) => copy(bytes),
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

/// Multiplies two matrices that are large enough to keep the device busy.
fn product(flops: f64, side: i32, dtype: Dtype) -> Result<Ceiling> {
    let inputs = vec![normal(0, &[side, side], dtype)?, normal(1, &[side, side], dtype)?];
    let amount = 2.0 * f64::from(side).powi(3) / flops;
    Ok(Ceiling { inputs, run: mlx(|x| x[0].matmul(&x[1])), amount })
}
