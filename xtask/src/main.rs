//! Sets up, tests, demonstrates, benches and bundles the workspace.
#![allow(clippy::print_stderr, reason = "a command line tool tells its user what it does")]

mod apple;
mod bench;
mod bundle;
mod cached;
mod demo;
mod distro;
mod fetch;
mod mlx;
mod model;
mod paths;
mod progress;
mod steps;
mod test;
mod tools;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Sets up, tests, demonstrates, benches and bundles the workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Provides MLX on this machine: on Linux from PyPI, on a Mac by checking Xcode's tools
    Setup {
        /// Also fetches MLX for NVIDIA GPUs, which `bundle` needs
        #[arg(long)]
        cuda: bool,
    },
    /// Generates text with a small model: `demo --prompt "..." --json`
    #[command(disable_help_flag = true)]
    Demo {
        /// For the example `generate`; see `demo --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Checks format, lints, documentation and all tests
    Test,
    /// Times operations beside the best of MLX: `bench --suite norm -o results.json`
    Bench {
        /// What to time, such as `norm`; may be given several times [default: all]
        #[arg(long, value_name = "NAME")]
        suite: Vec<String>,
        /// The JSON file to write
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Times nothing: puts the files of `benches/results/` into MEASUREMENTS.md
        #[arg(long, conflicts_with_all = ["suite", "output"])]
        report: bool,
    },
    /// Type-checks the library, examples, tests and benches for Apple silicon
    CheckApple,
    /// Packs the programs and MLX for an NVIDIA machine without network
    Bundle {
        /// The GPU's generation
        #[arg(long, default_value = "sm_90")]
        arch: String,
        /// The file to write [default: in the target folder]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<steps::Failed>() {
            Some(failed) => ExitCode::from(failed.0),
            None => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup { cuda } => {
            setup()?;
            if cuda {
                mlx::cuda::provide()?;
            }
            Ok(())
        }
        Task::Demo { args } => demo::run(args),
        Task::Test => test::run(),
        Task::Bench { report: true, .. } => bench::report(),
        Task::Bench { suite, output, .. } => bench::run(&suite, output),
        Task::CheckApple => apple::check(),
        Task::Bundle { arch, output } => bundle::run(&arch, output),
    }
}

/// Makes this machine ready to build and test the workspace.
fn setup() -> Result<()> {
    if cfg!(target_os = "macos") {
        return apple::check_tools();
    }
    mlx::setup()?;
    tools::offer(&[tools::CLANG, tools::SANITIZERS], "tests do not run kernels on the CPU");
    Ok(())
}
