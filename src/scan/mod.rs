//! Scans along an axis: each result is what has come before, combined.

mod associative;
mod causal_conv;
mod fading;
mod segments;
mod selective;
mod gated_delta;
mod gated_linear;
mod ssd;

pub use associative::{
    GenericScanOptions, ScanOperator, ScanOptions, affine_scan, affine_scan_with_state,
    associative_scan, associative_scan_with_state, generic_scan,
};
pub use causal_conv::{
    CausalConv1d, CausalConv1dBuilder, CausalConvOptions, causal_conv1d, causal_conv1d_with_state,
};
pub use gated_delta::{gated_delta_rule, gated_delta_rule_step, gated_delta_rule_with_state};
pub use gated_linear::{
    GatedLinearOptions, GatedLinearStep, gated_linear_attention, gated_linear_attention_step,
    gated_linear_attention_with_state, retention_log_decays,
};
pub use selective::{
    SelectiveScanOptions, SelectiveStepOptions, selective_scan, selective_scan_with_state,
    selective_state_update,
};
pub use ssd::{SsdInput, SsdOptions, SsdStep, ssd_scan, ssd_scan_with_state, ssd_step};

pub(crate) use associative::KERNELS as SCAN_KERNELS;
pub(crate) use fading::kernel::KERNELS as FADING_SCAN_KERNELS;
pub(crate) use selective::KERNELS as SELECTIVE_SCAN_KERNELS;
