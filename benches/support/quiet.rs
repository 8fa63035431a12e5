//! Keeps Criterion's own report, some lines a measurement, out of the way.

use std::{
    fs::{self, File},
    io::{Write as _, stderr, stdout},
    os::fd::OwnedFd,
    path::PathBuf,
    thread,
};

use anyhow::Result;
use rustix::{
    io::dup,
    stdio::{dup2_stderr, dup2_stdout},
};

/// While this lives, all that the process writes goes to a file; shown after all if it panics.
pub(super) struct Quiet {
    stdout: OwnedFd,
    stderr: OwnedFd,
    log: PathBuf,
}

impl Quiet {
    pub(super) fn new(log: PathBuf) -> Result<Self> {
        let file = File::create(&log)?;
        stdout().flush()?;
        let quiet = Self { stdout: dup(stdout())?, stderr: dup(stderr())?, log };
        dup2_stdout(&file)?;
        dup2_stderr(&file)?;
        Ok(quiet)
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = stdout().flush();
        let _ = dup2_stdout(&self.stdout);
        let _ = dup2_stderr(&self.stderr);
        if thread::panicking() {
            let _ = stderr().write_all(&fs::read(&self.log).unwrap_or_default());
        }
    }
}
