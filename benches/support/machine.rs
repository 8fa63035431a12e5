//! What the figures were measured on and with.

use std::{env, fs};

use anyhow::Result;
use mlx_primitives::{
    dispatch::Target,
    hardware::{device_name, mlx_version},
};

use super::{blas, results::Results};

/// Results without rows, of this machine as it is set up now. To be called once MLX has computed
/// something: it may load libraries no earlier.
pub(crate) fn describe(target: Target) -> Result<Results> {
    Ok(Results {
        device: device_name()?.unwrap_or_else(|| format!("{target:?}")),
        mlx: mlx_version()?,
        blas: linked_blas(target),
        tf32: target == Target::Cuda && tf32(env::var("MLX_ENABLE_TF32").ok().as_deref()),
        rows: Vec::new(),
    })
}

/// MLX multiplies f32 in TF32 on NVIDIA GPUs unless told not to.
fn tf32(variable: Option<&str>) -> bool {
    variable.is_none_or(|value| value.trim() != "0")
}

fn linked_blas(target: Target) -> String {
    if cfg!(target_vendor = "apple") {
        return "Accelerate".to_owned();
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let part = if target == Target::Cuda { "libcublas" } else { "blas" };
    blas::among(&maps, part).map_or_else(|| "an unknown BLAS".to_owned(), blas::sold_as)
}
