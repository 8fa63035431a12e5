//! Normalization over the last axis.

pub mod add_layer_norm;
pub mod add_rms_norm;
pub mod gated_rms_norm;
pub mod layer_norm;
pub mod rms_norm;
pub mod rms_norm_linear;

pub use add_layer_norm::add_layer_norm;
pub use add_rms_norm::add_rms_norm;
pub use gated_rms_norm::{
    GateOrder, GatedRmsNorm, GatedRmsNormBuilder, GatedRmsNormInput, GatedRmsNormOptions,
    gated_rms_norm,
};
pub use layer_norm::{LayerNorm, LayerNormBuilder, LayerNormOptions, layer_norm};
pub use rms_norm::{RmsNorm, RmsNormBuilder, RmsNormOptions, rms_norm};
pub use rms_norm_linear::{
    RmsNormLinear, RmsNormLinearBuilder, RmsNormLinearOptions, rms_norm_linear,
};
