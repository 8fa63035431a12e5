//! How fast the operations are beside the best of MLX, and beside what the device can do.
//!
//! `cargo xtask bench` runs this; CONTRIBUTING.md says how to add to it. Results are checked against
//! a reference first, always; without `--bench`, as Cargo's tests run it, that is all.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench reports to its user")]

mod support;

mod activation;
mod attention;
mod heads;
mod linear;
mod norm;
mod quant;
mod rope;
mod rows;
mod sampling;
mod scan;
mod selective_scan;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, builder::PossibleValuesParser};
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::{Context as Device, Target},
};

use crate::support::{
    Case, Setting, check, describe, measure,
    results::{Results, Row},
};

/// The cases of one subject, at sizes that suit the device.
type Suite = fn(Setting) -> Result<Vec<Case>>;

const SUITES: &[(&str, Suite)] = &[
    ("norm", norm::cases),
    ("rows", rows::cases),
    ("linear", linear::cases),
    ("activation", activation::cases),
    ("rope", rope::cases),
    ("heads", heads::cases),
    ("attention", attention::cases),
    ("scan", scan::cases),
    ("quant", quant::cases),
    ("selective_scan", selective_scan::cases),
    ("sampling", sampling::cases),
];

/// Checks operations, then times them beside the best of MLX.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Cli {
    /// What to run; everything by default
    #[arg(value_name = "SUITE", value_parser = names())]
    suites: Vec<String>,
    /// Writes what was measured as JSON
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Runs the cases alone whose operation, shape and dtype read like this, in part
    #[arg(long, value_name = "TEXT", default_value = "")]
    case: String,
    /// Runs this backend alone, and fails where an operation has none
    #[arg(long, value_name = "BACKEND", value_parser = backend)]
    only: Option<Backend>,
    /// Measures, as `cargo bench` asks; otherwise results are only checked
    #[arg(long)]
    bench: bool,
}

fn backend(name: &str) -> Result<Backend, String> {
    let known = Backend::ALL.iter().copied();
    let found = known.clone().find(|backend| backend.to_string() == name);
    found.ok_or_else(|| known.map(|backend| backend.to_string()).collect::<Vec<_>>().join(", "))
}

fn names() -> PossibleValuesParser {
    SUITES.iter().map(|(name, _)| *name).chain(["all"]).into()
}

impl Cli {
    fn asks_for(&self, suite: &str) -> bool {
        self.suites.is_empty() || self.suites.iter().any(|name| name == suite || name == "all")
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let target = Device::current()?.target;
    let setting = Setting { target, dispatch: cli.only.map_or(Dispatch::Auto, Dispatch::Only) };
    let (mut results, mut failures) = (None, Vec::new());
    for (name, suite) in SUITES.iter().filter(|(name, _)| cli.asks_for(name)) {
        for mut case in suite(setting).with_context(|| format!("the suite {name}"))? {
            let what = format!("{name}: {} {} {:?}", case.op, case.shape, case.dtype);
            if !what.contains(&cli.case) {
                continue;
            }
            match row(cli, &mut case, target) {
                Err(error) => {
                    eprintln!("{what}: {error:#}");
                    failures.push(what);
                }
                Ok(None) => eprintln!("{what}: right"),
                Ok(Some(row)) => {
                    eprintln!("{what}: {}", in_words(&row));
                    results = Some(keep(cli, results, row, target)?);
                }
            }
        }
    }
    if let Some(results) = results {
        println!("\n{}\n\n{}", results.heading(), results.table());
    }
    ensure!(failures.is_empty(), "{} cases failed: {}", failures.len(), failures.join(", "));
    Ok(())
}

/// What a case measures, if it is to measure; without that it is checked alone.
fn row(cli: &Cli, case: &mut Case, target: Target) -> Result<Option<Row>> {
    let checked = check(case)?;
    cli.bench.then(|| measure(case, checked, target)).transpose()
}

fn in_words(row: &Row) -> String {
    let Row { ours_us, ours_backend, ratio, baseline, ceiling_fraction, .. } = row;
    let percent = 100.0 * ceiling_fraction;
    format!("{ours_us} µs on {ours_backend}, {ratio:.2} × {baseline}, {percent:.0} % of ceiling")
}

/// Adds a row, and writes all of them: a run cut short has then not been for nothing.
fn keep(cli: &Cli, results: Option<Results>, row: Row, target: Target) -> Result<Results> {
    let mut results = results.map_or_else(|| describe(target), Ok)?;
    results.rows.push(row);
    if let Some(file) = &cli.output {
        let json = serde_json::to_string_pretty(&results)? + "\n";
        fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(results)
}
