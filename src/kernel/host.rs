//! Kernels on the CPU, for tests.

use std::sync::OnceLock;

use mlx_rs::{Array, error::Result};

use super::Call;

/// Runs kernels where there is no GPU.
///
/// Meant for tests: it may evaluate the inputs, so a kernel that it runs works neither inside
/// `mlx_rs::transforms::compile::compile` nor lazily.
pub trait Host: Send + Sync {
    /// The outputs of `call`, or why there are none. Inputs that [are written](super::Argument::is_written) are so where they
    /// lie.
    ///
    /// # Errors
    /// Whatever the text, or a checker that watched it run, has to complain of.
    fn run(&self, call: &Call) -> Result<Vec<Array>>;
}

static HOST: OnceLock<Box<dyn Host>> = OnceLock::new();

/// From now on, and in the whole process, kernels that are asked for on a CPU stream run on `host`.
///
/// The first host stays: returns whether `host` was it. `Dispatch::Auto` never picks it.
pub fn set_host(host: impl Host + 'static) -> bool {
    HOST.set(Box::new(host)).is_ok()
}

pub(super) fn is_set() -> bool {
    HOST.get().is_some()
}

pub(super) fn get() -> Option<&'static dyn Host> {
    HOST.get().map(Box::as_ref)
}
