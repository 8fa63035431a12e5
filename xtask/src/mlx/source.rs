//! Finds mlx-c's sources, which ship inside the mlx-sys crate.
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::progress::Progress;
use crate::steps;

/// The folder of mlx-c; Cargo downloads the crate if need be.
pub(crate) fn mlx_c() -> Result<PathBuf> {
    let args = ["metadata", "--format-version=1", "--quiet"];
    let output =
        Progress::during("looking up mlx-sys", 0, |_| steps::output(&mut steps::cargo(args)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().find(|line| line.starts_with("error")).unwrap_or("error: unknown");
        bail!("cargo metadata failed ({}); check the network", why.trim_start_matches("error: "));
    }
    let metadata = serde_json::from_slice(&output.stdout).context("reading cargo metadata")?;
    mlx_c_in(&metadata).context("cargo metadata names no mlx-sys")
}

fn mlx_c_in(metadata: &Value) -> Option<PathBuf> {
    let mut packages = metadata["packages"].as_array()?.iter();
    let mlx_sys = packages.find(|package| package["name"] == "mlx-sys")?;
    let manifest = Path::new(mlx_sys["manifest_path"].as_str()?);
    Some(manifest.parent()?.join("src/mlx-c"))
}

/// The files of mlx-c's interface that end in `.extension`, in order.
pub(crate) fn files(mlx_c: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let dir = mlx_c.join("mlx/c");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    files.retain(|file| file.extension() == Some(OsStr::new(extension)));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mlx_c_lies_beside_the_manifest() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "other", "manifest_path": "/a/Cargo.toml" },
            { "name": "mlx-sys", "manifest_path": "/b/mlx-sys/Cargo.toml" },
        ]});
        assert_eq!(mlx_c_in(&metadata), Some("/b/mlx-sys/src/mlx-c".into()));
        assert_eq!(mlx_c_in(&Value::Null), None);
    }
}
