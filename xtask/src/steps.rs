//! Runs other programs.
use std::ffi::OsStr;
use std::fmt;
use std::process::{Command, ExitStatus, Output};

use anyhow::{Context, Result};

use crate::paths;

/// A program ended badly after saying why: only its exit code is left to pass on.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) u8);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Failed {}

/// `cargo ARGS...` in the repository's root, by the cargo that runs this.
pub(crate) fn cargo(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args).current_dir(paths::root());
    // Either would hide the flags in `.cargo/mlx.toml`, and so where libmlx.so lies.
    command.env_remove("RUSTFLAGS").env_remove("RUSTDOCFLAGS");
    command
}

/// The library's features for this machine: off Apple's, its defaults have no meaning.
pub(crate) fn features() -> &'static [&'static str] {
    if cfg!(target_os = "macos") { &[] } else { &["--no-default-features"] }
}

/// Runs `command` to its end with this process's streams; [`Failed`] unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_run(command))?;
    if status.success() { Ok(()) } else { Err(Failed(code(status)).into()) }
}

/// Runs `command` and returns what it wrote.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| cannot_run(command))
}

/// Whether `program ARGS...` can be run here, and succeeds.
pub(crate) fn succeeds(program: impl AsRef<OsStr>, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

fn cannot_run(command: &Command) -> String {
    format!("cannot run {}", command.get_program().display())
}

/// The code a shell would report.
fn code(status: ExitStatus) -> u8 {
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or_else(|| {
        use std::os::unix::process::ExitStatusExt as _;
        status.signal().and_then(|signal| u8::try_from(128 + signal).ok()).unwrap_or(1)
    })
}

/// The command as a person would type it, without its environment.
pub(crate) fn shown(command: &Command) -> String {
    let name = command.get_program();
    let name = std::path::Path::new(name).file_name().unwrap_or(name);
    let words = [name].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_and_signals_pass_through() {
        let code_of = |script: &str| {
            let failed = run(Command::new("sh").args(["-c", script]));
            failed.err().and_then(|error| error.downcast::<Failed>().ok()).map(|failed| failed.0)
        };
        assert_eq!(code_of("exit 0"), None);
        assert_eq!(code_of("exit 7"), Some(7));
        assert_eq!(code_of("kill -9 $$"), Some(137));
    }

    #[test]
    fn shown_as_typed() {
        let mut command = Command::new("/some/bin/cargo");
        assert_eq!(shown(command.args(["test", "--workspace"])), "cargo test --workspace");
    }
}
