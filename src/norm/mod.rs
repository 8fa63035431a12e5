//! Normalization over the last axis.
//!
//! [`rms_norm`](rms_norm()) and [`layer_norm`](layer_norm()); the same after a residual addition, in one pass over memory ([`add_rms_norm`](add_rms_norm()),
//! [`add_layer_norm`](add_layer_norm())); with a gate, as Mamba-2 has it ([`gated_rms_norm`](gated_rms_norm())); and with the linear layer that follows
//! ([`rms_norm_linear`](rms_norm_linear())).

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
