//! Everything that must pass before a change is merged.
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{model, setup, steps};

/// Runs every check in turn; the first that fails ends it, with its exit code.
pub(crate) fn run() -> Result<()> {
    setup()?;
    let model = model::provide()?;
    let mut times = Vec::new();
    let mut result = Ok(());
    for (name, mut command) in checks() {
        eprintln!("\n$ {}", steps::shown(&command));
        let started = Instant::now();
        result = steps::run(command.env("MLX_PRIMITIVES_TEST_MODEL", &model));
        times.push((name, result.is_ok(), started.elapsed()));
        if result.is_err() {
            break;
        }
    }
    eprintln!("\n{}", table(&times));
    result
}

fn checks() -> Vec<(&'static str, Command)> {
    let with = |args: &str, features: &[&str], rest: &str| {
        let mut command = steps::cargo(args.split_whitespace());
        command.args(features).args(rest.split_whitespace());
        command
    };
    let bare = steps::features();
    let all = &[bare, &["--features", "mlx-primitives/llguidance"]].concat()[..];
    let mut doc = with("doc --workspace --no-deps", all, "");
    doc.env("RUSTDOCFLAGS", "-Dwarnings");
    vec![
        ("format", with("fmt --all --check", &[], "")),
        ("clippy", with("clippy --workspace --all-targets", all, "-- -D warnings")),
        // The library as most build it.
        ("clippy bare", with("clippy --lib", bare, "-- -D warnings")),
        ("doc", doc),
        ("test", with("test --workspace --exclude xtask", all, "")),
        // Checks that every bench computes what it should; times nothing.
        ("benches", with("test --bench bench", all, "")),
        // In the profile that it was built in already.
        ("test xtask", with("test --profile xtask --package xtask", &[], "")),
    ]
}

fn table(times: &[(&str, bool, Duration)]) -> String {
    let row = |&(name, passed, time): &(&str, bool, Duration)| {
        let verdict = if passed { "ok" } else { "FAILED" };
        format!("{name:<12}{verdict:<8}{:>7.1} s", time.as_secs_f64())
    };
    times.iter().map(row).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_a_row_a_check() {
        let times = [("format", true, Duration::from_millis(1250)), ("doc", false, Duration::ZERO)];
        assert_eq!(table(&times), "format      ok          1.2 s\ndoc         FAILED      0.0 s");
    }
}
