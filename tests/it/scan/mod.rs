//! Scans, and the recurrences that are made of them.

mod affine;
mod associative;
mod cases;
mod causal_conv;
mod complex;
mod gated;
mod generic;
mod gradient;
mod long;
mod oracle;
mod properties;
mod refusal;
mod selective;
mod selective_oracle;
mod ssd;

use mlx_primitives::{Backend, dispatch::Target};
use mlx_rs::Dtype;

use crate::support::compare::Tolerance;

/// How exact the f32 states are where matrices make them: a GPU, and a kernel, multiplies those in the dtype of the arrays.
fn dtype_of_states(backend: Backend, dtype: Dtype) -> Dtype {
    let rounded = backend == Backend::Kernel || Target::current().unwrap() != Target::Cpu;
    if rounded { dtype } else { Dtype::Float32 }
}

/// The tolerance of `op` where factors of matrices may be rounded.
fn tolerance(op: &str, backend: Backend, dtype: Dtype) -> Tolerance {
    match backend == Backend::Kernel {
        true => Tolerance::here(&format!("{op} on {backend}"), dtype),
        false => Tolerance::here(op, dtype),
    }
}
