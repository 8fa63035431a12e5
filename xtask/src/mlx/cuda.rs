//! MLX for NVIDIA GPUs: only carried to such a machine, never run here.
use std::path::PathBuf;

use anyhow::Result;

use super::VERSION;
use crate::fetch::{self, Wheel};
use crate::{cached, paths};

const WHEEL: Wheel = Wheel {
    name: "mlx-cuda-13",
    version: VERSION,
    hashes: &[
        "335094ccd1c0c6dc3e09c8caba207c8180602bacc0c38ba20c1d81e9456ab394", // x86_64
        "49b1a25df9021f3b519a534fd39a32a5cdbf93a1b265a31e59671c2d9fc9f4a2", // aarch64
    ],
};

/// The folder with the wheel's contents; fetched on first use.
pub(crate) fn provide() -> Result<PathBuf> {
    let name = format!("{}-{VERSION}-{}", WHEEL.name, std::env::consts::ARCH);
    let home = paths::cache()?.join(name);
    cached::provide(&home, |at| WHEEL.fetch(at, |wheel| fetch::unpack(wheel, at)))?;
    Ok(home)
}
