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

use mlx_primitives::dispatch::Target;
use mlx_rs::Dtype;

/// How exact the f32 states are where matrices make them: a GPU multiplies those in the dtype of the arrays.
fn dtype_of_states(dtype: Dtype) -> Dtype {
    match Target::current().unwrap() {
        Target::Cpu => Dtype::Float32,
        _ => dtype,
    }
}
