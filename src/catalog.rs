//! Every kernel of the crate.

use crate::{kernel::Kernel, norm};

/// Every kernel of the crate, in the order of the operations.
pub fn kernels() -> impl Iterator<Item = &'static Kernel> {
    [norm::add_rms_norm::KERNELS, norm::rms_norm_linear::KERNELS].into_iter().flatten().copied()
}
