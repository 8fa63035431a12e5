//! Scans along an axis: each result is what has come before, combined.

mod associative;
mod causal_conv;
mod fading;
mod segments;
mod selective;
mod ssd;

pub use associative::{
    GenericScanOptions, ScanOperator, ScanOptions, affine_scan, affine_scan_with_state,
    associative_scan, associative_scan_with_state, generic_scan,
};
pub use causal_conv::{
    CausalConv1d, CausalConv1dBuilder, CausalConvOptions, causal_conv1d, causal_conv1d_with_state,
};
pub use selective::{
    SelectiveScanOptions, SelectiveStepOptions, selective_scan, selective_scan_with_state,
    selective_state_update,
};
pub use ssd::{SsdInput, SsdOptions, SsdStep, ssd_scan, ssd_scan_with_state, ssd_step};

pub(crate) use associative::KERNELS as SCAN_KERNELS;
pub(crate) use selective::KERNELS as SELECTIVE_SCAN_KERNELS;
