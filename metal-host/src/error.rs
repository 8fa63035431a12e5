//! What can be wrong with a kernel, or with running one.

use std::{fmt, io, path::PathBuf};

use crate::launch::Build;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a kernel gave no outputs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This machine cannot compile kernels.
    #[error("kernels cannot be compiled here: {reason}")]
    NoCompiler {
        /// What is missing, and how to get it.
        reason: String,
    },
    /// The kernel, its arrays or its launch make no sense together; nothing was run.
    #[error("[{kernel}] {reason}")]
    Invalid {
        /// The kernel's name.
        kernel: String,
        /// What is wrong.
        reason: String,
    },
    /// The kernel breaks a rule of how kernels are written here; nothing was compiled.
    #[error("{place}: [{kernel}] {message}")]
    Rule {
        /// The kernel's name.
        kernel: String,
        /// Where.
        place: Place,
        /// The rule, and what to write instead.
        message: String,
    },
    /// The kernel does not compile.
    #[error("{place}: [{kernel}] {message}\n{report}")]
    Compile {
        /// The kernel's name.
        kernel: String,
        /// Where the first error is.
        place: Place,
        /// The first error.
        message: String,
        /// All that the compiler said.
        report: String,
    },
    /// The kernel was run, and is wrong.
    #[error(transparent)]
    Finding(#[from] Finding),
    /// The compiler or a compiled kernel failed in a way that says nothing about the kernel.
    #[error("[{kernel}] {message}")]
    Machine {
        /// The kernel's name.
        kernel: String,
        /// What failed, and what it said.
        message: String,
    },
    /// A file of the cache, or of a run, could not be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// The finding, if it is one.
    pub fn finding(&self) -> Option<&Finding> {
        match self {
            Error::Finding(finding) => Some(finding),
            _ => None,
        }
    }
}

/// A line of a kernel's text, by the `#line` before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file; the kernel's name where the text has no `#line`.
    pub file: String,
    /// The line, from 1.
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Something wrong that showed when a kernel ran.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{place}: [{kernel}] {kind}: {message} (build {build:?}, schedule {schedule}, poison {poison:#04x})"
)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// The kernel's name.
    pub kernel: String,
    /// Where; the body's first line if nothing closer is known.
    pub place: Place,
    /// What was seen.
    pub message: String,
    /// The build that saw it.
    pub build: Build,
    /// The schedule it was seen under.
    pub schedule: u64,
    /// The poison it was seen with.
    pub poison: u8,
    /// All that the run said.
    pub report: String,
}

/// The kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Two threads use one place in memory, at least one writes, and no barrier is between them.
    Race,
    /// An access outside of an array.
    Address,
    /// Something that the language leaves undefined, such as a shift by too much.
    Undefined,
    /// A decision or an address depends on memory that nothing wrote.
    Uninitialised,
    /// Threads that should meet at a barrier or a simdgroup function do not.
    Divergence,
    /// More threadgroup memory than every Apple GPU has.
    ThreadgroupMemory,
    /// An output has elements that were never given a value.
    Unwritten,
    /// The outputs depend on the order in which threads run.
    ScheduleDependent,
    /// The outputs depend on what was in memory before.
    PoisonDependent,
    /// The kernel did not end in time.
    TimeOut,
    /// The kernel's process died.
    Crash,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Race => "race",
            Kind::Address => "access outside of an array",
            Kind::Undefined => "undefined behaviour",
            Kind::Uninitialised => "use of memory that nothing wrote",
            Kind::Divergence => "divergence",
            Kind::ThreadgroupMemory => "too much threadgroup memory",
            Kind::Unwritten => "unwritten output",
            Kind::ScheduleDependent => "outputs that depend on the schedule",
            Kind::PoisonDependent => "outputs that depend on earlier memory",
            Kind::TimeOut => "time-out",
            Kind::Crash => "crash",
        })
    }
}
