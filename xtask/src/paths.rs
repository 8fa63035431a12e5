//! Where things lie: the repository, and the cache for what it needs from elsewhere.
use std::ffi::OsString;
use std::path::{self, Path, PathBuf};

use anyhow::{Context, Result};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where this repository's checkouts share what they fetch and compile.
pub(crate) fn cache() -> Result<PathBuf> {
    let dir = cache_from(|name| std::env::var_os(name).filter(|value| !value.is_empty()))?;
    Ok(path::absolute(dir)?)
}

fn cache_from(var: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    if let Some(dir) = var("MLX_PRIMITIVES_CACHE") {
        return Ok(dir.into());
    }
    let base = match var("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(var("HOME").context("HOME is not set; set MLX_PRIMITIVES_CACHE")?)
            .join(".cache"),
    };
    Ok(base.join("mlx-primitives"))
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache_given(vars: &[(&str, &str)]) -> Option<PathBuf> {
        let find = |name: &str| vars.iter().find(|(key, _)| *key == name);
        cache_from(|name| find(name).map(|(_, value)| value.into())).ok()
    }

    #[test]
    fn own_variable_wins_then_xdg_then_home() {
        let own = ("MLX_PRIMITIVES_CACHE", "/own");
        let xdg = ("XDG_CACHE_HOME", "/xdg");
        let home = ("HOME", "/home/me");
        let is = |vars: &[_], dir: &str| assert_eq!(cache_given(vars), Some(dir.into()));
        is(&[own, xdg, home], "/own");
        is(&[xdg, home], "/xdg/mlx-primitives");
        is(&[home], "/home/me/.cache/mlx-primitives");
        assert_eq!(cache_given(&[]), None);
    }
}
