//! Linear and embedding layers over weights in MLX's affine packed format: groups of `G` weights in 2 to 8 bits, with a scale and a
//! bias each.
//!
//! [`QuantizedWeight`] packs and unpacks, [`quantized_linear`] multiplies, [`QuantizedLinear`] and [`QuantizedEmbedding`] are the
//! modules, and [`QuantizedCompute`] says whether they multiply by the packed weight or by an unpacked copy.

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
