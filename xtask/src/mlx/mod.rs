//! Provides MLX on Linux, and tells Cargo where it lies.
mod bindings;
mod blas;
pub(crate) mod cargo_config;
mod compile;
pub(crate) mod cuda;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::fetch::{self, Wheel};
use crate::progress::Progress;
use crate::{cached, paths, tools};

/// The version of MLX that mlx-sys builds on a Mac.
const VERSION: &str = "0.32.2";
/// The version of mlx-sys that this recipe is for.
const MLX_SYS: &str = "0.7.0";

const WHEEL: Wheel = Wheel {
    name: "mlx-cpu",
    version: VERSION,
    hashes: &[
        "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878", // x86_64
        "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b", // aarch64
    ],
};

/// MLX as set up in the cache: `mlx/` of the wheel, `lib/` with mlx-c, `out/` with the bindings.
#[derive(Debug)]
pub(crate) struct Home(PathBuf);

impl Home {
    /// The folder of `libmlx.so`.
    pub(crate) fn mlx_lib(&self) -> PathBuf {
        self.0.join("mlx/lib")
    }

    /// The folder of the static libraries compiled here.
    pub(crate) fn own_lib(&self) -> PathBuf {
        self.0.join("lib")
    }

    /// The folder of `bindings.rs`.
    pub(crate) fn out(&self) -> PathBuf {
        self.0.join("out")
    }

    /// Whether all that a build needs is there; a package update may have removed OpenBLAS.
    fn is_whole(&self) -> bool {
        let files = ["mlx/lib/libmlx.so", "lib/libmlxc.a", "lib/libmachtime.a", "out/bindings.rs"];
        files.iter().all(|file| self.0.join(file).is_file()) && blas::is_swapped(&self.0)
    }
}

/// Sets MLX up for this checkout: a second run only looks.
pub(crate) fn setup() -> Result<Home> {
    let triple = triple()?;
    check_lock(&fs::read_to_string(paths::root().join("Cargo.lock"))?)?;
    let name = format!("mlx-{VERSION}-{}-{:016x}", std::env::consts::ARCH, recipe());
    let home = Home(paths::cache()?.join(name));
    if home.0.exists() && !home.is_whole() {
        cached::remove(&home.0);
    }
    cached::provide(&home.0, build)?;
    let config = cargo_config::linux(&triple, &home)?;
    cargo_config::write(&paths::root().join(".cargo/mlx.toml"), &config)?;
    Ok(home)
}

/// The target triple whose builds MLX is set up for.
fn triple() -> Result<String> {
    let arch = std::env::consts::ARCH;
    if !matches!(arch, "x86_64" | "aarch64") || !cfg!(target_env = "gnu") {
        bail!("PyPI has MLX for x86_64 and aarch64 Linux with glibc only");
    }
    Ok(format!("{arch}-unknown-linux-gnu"))
}

fn check_lock(lock: &str) -> Result<()> {
    let entry = "name = \"mlx-sys\"\nversion = \"";
    let (_, rest) = lock.split_once(entry).context("Cargo.lock has no mlx-sys")?;
    let version = rest.split('"').next().unwrap_or_default();
    if version != MLX_SYS {
        bail!("xtask/src/mlx knows mlx-sys {MLX_SYS}, but Cargo.lock has {version}");
    }
    Ok(())
}

/// A hash over all that decides what [`build`] makes: its own sources included.
fn recipe() -> u64 {
    let parts = [
        VERSION,
        MLX_SYS,
        include_str!("../../native/compat.h"),
        include_str!("../../native/half.h"),
        include_str!("../../native/mach_time.c"),
        include_str!("bindings.rs"),
        include_str!("blas.rs"),
        include_str!("compile.rs"),
    ];
    fnv(parts.into_iter().chain(WHEEL.hashes.iter().copied()))
}

/// FNV-1a: the same in every build of this program, which std's hashers do not promise.
fn fnv<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = parts.flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Makes a [`Home`] at `home`, from nothing.
fn build(home: &Path) -> Result<()> {
    use tools::{AR, CXX, LIBCLANG, OPENBLAS, PIP, PYTHON};
    eprintln!("setting up MLX {VERSION}, once for this machine");
    tools::ensure(&[CXX, AR, PYTHON, PIP, LIBCLANG, OPENBLAS])?;
    let mlx_c = source::mlx_c()?;
    WHEEL.fetch(home, |wheel| fetch::unpack(wheel, home))?;
    blas::swap(home)?;
    fs::create_dir(home.join("lib"))?;
    compile::mlx_c(&mlx_c, home)?;
    compile::mach_time(home)?;
    fs::create_dir(home.join("out"))?;
    Progress::during("generating bindings", 0, |_| {
        bindings::write(&mlx_c, home, &home.join("out/bindings.rs"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_must_hold_the_known_mlx_sys() {
        let lock = |version| format!("[[package]]\nname = \"mlx-sys\"\nversion = \"{version}\"\n");
        assert!(check_lock(&lock(MLX_SYS)).is_ok());
        let told = check_lock(&lock("0.8.1")).map_err(|error| error.to_string());
        assert!(told.is_err_and(|text| text.contains("has 0.8.1")));
        assert!(check_lock("").is_err());
    }

    #[test]
    fn hash_separates_its_parts() {
        assert_ne!(fnv(["ab", "c"].into_iter()), fnv(["a", "bc"].into_iter()));
        assert_eq!(fnv(std::iter::empty()), 0xcbf2_9ce4_8422_2325);
    }
}
