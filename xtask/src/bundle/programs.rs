//! Builds the workspace's programs optimized, and finds where Cargo put them.
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::steps;

/// Name in the bundle and file, of every example, test binary and bench binary.
pub(super) fn build() -> Result<Vec<(String, PathBuf)>> {
    let mut programs = Vec::new();
    for args in [
        &["build", "--release", "--examples"][..],
        &["test", "--release", "--no-run"],
        &["bench", "--no-run"],
    ] {
        programs.extend(built_by(args)?);
    }
    programs.sort();
    programs.dedup_by(|next, first| next.0 == first.0);
    Ok(programs)
}

fn built_by(args: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let mut command = steps::cargo(args);
    command.args(steps::features()).arg("--message-format=json-render-diagnostics");
    eprintln!("$ {}", steps::shown(&command));
    let output = steps::output(command.stderr(Stdio::inherit()))?;
    if !output.status.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    let messages = String::from_utf8(output.stdout).context("cargo's messages")?;
    Ok(messages.lines().filter_map(program).collect())
}

/// The program that one of Cargo's JSON messages reports, if it does.
fn program(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let executable = message["executable"].as_str()?.into();
    let target = &message["target"];
    let name = target["name"].as_str()?;
    let tested = message["profile"]["test"] == true;
    let name = match target["kind"][0].as_str()? {
        "example" if !tested => name.to_owned(),
        "bench" => name.to_owned(),
        "test" => format!("test-{name}"),
        "lib" if tested => "test-unit".to_owned(),
        _ => return None,
    };
    Some((name, executable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(kind: &str, test: bool, executable: Option<&str>) -> Option<String> {
        let message = serde_json::json!({
            "reason": "compiler-artifact",
            "target": { "kind": [kind], "name": "thing" },
            "profile": { "test": test },
            "executable": executable,
        });
        program(&message.to_string()).map(|(name, _)| name)
    }

    #[test]
    fn executables_are_named_by_kind() {
        let name = |kind, test| named(kind, test, Some("/x"));
        assert_eq!(name("example", false).as_deref(), Some("thing"));
        assert_eq!(name("bench", true).as_deref(), Some("thing"));
        assert_eq!(name("test", true).as_deref(), Some("test-thing"));
        assert_eq!(name("lib", true).as_deref(), Some("test-unit"));
        assert_eq!(name("custom-build", false), None);
        assert_eq!(named("lib", false, None), None);
        assert_eq!(program("   Compiling thing"), None);
    }
}
