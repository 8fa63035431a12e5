//! Runs Metal kernels on the CPU, under sanitizers, exactly as MLX would compile them.
//!
//! [`generate`] writes the text that MLX's `fast::metal_kernel` gives to Apple's compiler, to the letter. [`Host`]
//! compiles it with clang, which keeps Metal's address spaces apart, and runs it with one fibre for each GPU
//! thread in a process of its own. What is wrong with a kernel is an [`Error`] that names a line of its file.
//!
//! What it cannot show: speed, the rounding of Apple's fast mathematics, effects of memory order between
//! threadgroups, and that Apple's compiler takes the text.

mod source;
mod launch;
mod error;
mod place;
mod generate;
mod lint;
mod files;
mod compiler;
mod job;
mod report;
mod host;
mod check;

pub use check::Check;
pub use error::{Error, Finding, Kind, Place, Result};
pub use files::METAL_TARGET;
pub use generate::{ATTRIBUTES, Generated, Slot, generate};
pub use host::Host;
pub use launch::{Build, Launch, Run};
pub use source::{Element, Input, Output, Source, Template};
