//! Where the model runs.

use anyhow::{Result, ensure};
use mlx_primitives::dispatch::{Context, Target};

use crate::args::Device;

/// Makes the device asked for the default one, and names it.
pub(crate) fn select(asked: Option<Device>) -> Result<&'static str> {
    if asked == Some(Device::Cpu) {
        mlx_rs::Device::set_default(&mlx_rs::Device::cpu());
    }
    // MLX's default is a GPU wherever it finds one.
    let target = Context::current()?.target;
    let missing = asked == Some(Device::Gpu) && target == Target::Cpu;
    ensure!(!missing, "MLX finds no GPU on this machine: leave out --device gpu");
    Ok(if target == Target::Cpu { "cpu" } else { "gpu" })
}
