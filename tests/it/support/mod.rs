//! The ladder of trust: an f64 oracle checks every backend, and finite differences of the oracle
//! check gradients.

pub(crate) mod backends;
pub(crate) mod compare;
pub(crate) mod gradient;
pub(crate) mod host;
pub(crate) mod modules;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod tensor;

use mlx_rs::Dtype;

/// The element types that every floating-point operation takes.
pub(crate) const FLOATING: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];
