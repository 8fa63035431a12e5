//! Normalization over the last axis.

pub mod layer_norm;
pub mod rms_norm;

pub use layer_norm::{LayerNorm, LayerNormBuilder, LayerNormOptions, layer_norm};
pub use rms_norm::{RmsNorm, RmsNormBuilder, RmsNormOptions, rms_norm};
