//! Cargo configuration that stands in for mlx-sys's build script, which is for Apple only.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Home;

/// The configuration for building and running on this machine.
pub(super) fn linux(triple: &str, home: &Home) -> Result<String> {
    let mlx_lib = utf8(&home.mlx_lib())?.to_owned();
    let rpath = quoted(&format!("link-arg=-Wl,-rpath,{mlx_lib}"));
    let (mlx_lib, own_lib) = (format!("native={mlx_lib}"), home.own_lib());
    let (mlx_lib, own_lib) = (quoted(&mlx_lib), quoted(&format!("native={}", utf8(&own_lib)?)));
    let out = quoted(utf8(&home.out())?);
    Ok(format!(
        r#"# Written by `cargo xtask setup`: where MLX lies on this machine.
[target.{triple}.mlx]
rustc-link-search = [{mlx_lib}, {own_lib}]
rustc-link-lib = ["static=mlxc", "static=machtime", "dylib=mlx", "dylib=stdc++"]
rustc-env = {{ OUT_DIR = {out} }}

[target.{triple}]
rustflags = ["-C", {rpath}]
rustdocflags = ["-C", {rpath}]
"#
    ))
}

/// The configuration for type-checking `triple`: bindings, and nothing to link.
pub(crate) fn check_only(triple: &str, out: &Path) -> Result<String> {
    let out = quoted(utf8(out)?);
    Ok(format!("[target.{triple}.mlx]\nrustc-link-lib = []\nrustc-env = {{ OUT_DIR = {out} }}\n"))
}

/// `text` as a TOML string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Writes `text` to `path` unless it is there already, so that Cargo sees a change only if it is.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("toml.tmp-{}", std::process::id()));
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped() {
        assert_eq!(quoted("/a b/c"), r#""/a b/c""#);
        assert_eq!(quoted("q\"b\\n\n"), r#""q\"b\\n\u000A""#);
    }

    #[test]
    fn linux_config_names_every_folder() -> Result<()> {
        let text = linux("aarch64-unknown-linux-gnu", &Home("/c/home".into()))?;
        let has = |line: &str| assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        has("[target.aarch64-unknown-linux-gnu.mlx]");
        has(r#"rustc-link-search = ["native=/c/home/mlx/lib", "native=/c/home/lib"]"#);
        has(r#"rustc-env = { OUT_DIR = "/c/home/out" }"#);
        has(r#"rustflags = ["-C", "link-arg=-Wl,-rpath,/c/home/mlx/lib"]"#);
        Ok(())
    }

    #[test]
    fn check_only_links_nothing() -> Result<()> {
        let text = check_only("aarch64-apple-darwin", Path::new("/o"))?;
        assert!(text.starts_with("[target.aarch64-apple-darwin.mlx]\nrustc-link-lib = []\n"));
        assert!(text.contains("OUT_DIR = \"/o\""));
        Ok(())
    }
}
