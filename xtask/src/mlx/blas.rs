//! Gives MLX a fast BLAS.
//!
//! The wheel brings the reference implementation, 25 times slower than OpenBLAS at a 1024³ `f32`
//! product. Both have the same interface, and MLX finds its BLAS by one file name: a link does it.
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools;

/// Puts OpenBLAS where the wheel unpacked in `home` has its BLAS.
pub(super) fn swap(home: &Path) -> Result<()> {
    let openblas = tools::needed(tools::openblas(), tools::OPENBLAS)?;
    let file = wheel_file(home).context("the wheel has no BLAS to replace")?;
    fs::remove_file(&file)?;
    symlink(openblas, file)?;
    Ok(())
}

/// Whether the BLAS is a link to a file that is still there.
pub(super) fn is_swapped(home: &Path) -> bool {
    wheel_file(home).is_some_and(|file| file.is_symlink() && file.exists())
}

fn wheel_file(home: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(home.join("mlx_cpu.libs")).ok()?;
    let mut files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libblas")
    })
}
