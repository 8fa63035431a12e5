//! Times the operations, and shows what was measured.
mod report;
#[path = "../../../benches/support/results.rs"]
mod results;

use std::path::{self, PathBuf};

use anyhow::Result;

pub(crate) use report::write as report;

use crate::{setup, steps};

/// Runs the bench binary on `suites`, or on all of them.
pub(crate) fn run(suites: &[String], output: Option<PathBuf>) -> Result<()> {
    setup()?;
    let mut bench = steps::cargo(["bench", "--bench", "bench"]);
    bench.args(steps::features()).arg("--").args(suites);
    if let Some(output) = output {
        // Cargo runs benches in the package's folder, the user means the current one.
        bench.arg("--output").arg(path::absolute(output)?);
    }
    steps::run(&mut bench)
}
