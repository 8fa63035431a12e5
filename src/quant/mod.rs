//! Linear layers over weights in MLX's affine packed format.

mod linear;
mod weight;

pub use linear::{QuantizedLinearOptions, quantized_linear};
pub use weight::QuantizedWeight;
