//! Scans along an axis: each result combines everything before it.
//!
//! | function | recurrence |
//! |---|---|
//! | [`associative_scan`] | sums, products, maxima, minima or log-sum-exps so far |
//! | [`affine_scan`] | `h_t = a_t · h_{t−1} + b_t` |
//! | [`generic_scan`] | any associative function of the caller's |
//! | [`selective_scan`] | Mamba: a state for each channel, with decays that depend on the input |
//! | [`ssd_scan`] | Mamba-2: one decay for each head and step, in chunks of matrix products |
//! | [`gated_linear_attention`] | linear attention with decays, for each head (retention, [`retention_log_decays`]) or element |
//! | [`gated_delta_rule`] | the same, where a new value replaces what its key retrieves |
//! | [`causal_conv1d`] | short convolution of each channel, as it stands before these scans in a block |
//!
//! The model scans have a `_with_state` form, which also returns the last state, and a `_step` (or [`selective_state_update`])
//! that decodes one token from it. Whole blocks are in [`ssm`](crate::ssm).

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
