//! Every kernel of the crate.

use crate::{activation, attention, kernel::Kernel, norm, rope, sampling, scan};

/// Every kernel of the crate, in the order of the operations.
pub fn kernels() -> impl Iterator<Item = &'static Kernel> {
    OPERATIONS.iter().copied().flatten().copied()
}

const OPERATIONS: &[&[&Kernel]] = &[
    norm::rms_norm::KERNELS,
    norm::add_rms_norm::KERNELS,
    norm::gated_rms_norm::KERNELS,
    norm::layer_norm::KERNELS,
    norm::add_layer_norm::KERNELS,
    norm::rms_norm_linear::KERNELS,
    activation::glu::KERNELS,
    activation::softmax::KERNELS,
    rope::ROPE_QK_KERNELS,
    rope::QK_NORM_ROPE_KERNELS,
    attention::FLASH_KERNELS,
    attention::DECODE_KERNELS,
    attention::PAGED_KERNELS,
    attention::IN_PLACE_KERNELS,
    scan::SCAN_KERNELS,
    scan::SELECTIVE_SCAN_KERNELS,
    scan::FADING_SCAN_KERNELS,
    sampling::SAMPLE_ROWS_KERNELS,
];
