//! Linear layers over weights in MLX's affine packed format.

mod compute;
mod embedding;
mod frozen;
mod layer;
mod linear;
mod weight;

pub use compute::QuantizedCompute;
pub use embedding::{QuantizedEmbedding, QuantizedEmbeddingBuilder};
pub use layer::{QuantizedLinear, QuantizedLinearBuilder};
pub use linear::{QuantizedLinearOptions, quantized_linear};
pub use weight::QuantizedWeight;
