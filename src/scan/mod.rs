//! Scans along an axis: each result is what has come before, combined.

mod associative;

pub use associative::{
    GenericScanOptions, ScanOperator, ScanOptions, affine_scan, affine_scan_with_state,
    associative_scan, associative_scan_with_state, generic_scan,
};

pub(crate) use associative::KERNELS as SCAN_KERNELS;
