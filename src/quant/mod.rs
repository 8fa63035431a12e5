//! Linear layers over weights in MLX's affine packed format.

mod weight;

pub use weight::QuantizedWeight;
