//! Normalization over the last axis.

pub mod rms_norm;

pub use rms_norm::{RmsNorm, RmsNormBuilder, RmsNormOptions, rms_norm};
