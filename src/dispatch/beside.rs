//! A second thread for a second product, on a CPU.

use std::cell::OnceCell;

use mlx_rs::{Array, Device, Stream, with_stream};

use super::{Context, Target};
use crate::error::Result;

/// The fewest weights for which a second thread gains more than waiting for it costs, which is
/// some tens of microseconds.
const WORTH_A_THREAD: usize = 1 << 19;

thread_local! {
    /// A stream is a thread of MLX's CPU back end and is never given back: one for each caller.
    static SIDE: OnceCell<Stream> = const { OnceCell::new() };
}

/// Builds another product with `x` so that a CPU computes it beside `first`, which is one too.
///
/// BLAS splits a product of many rows among threads, but multiplies a lone row on the thread it is
/// called on, and MLX calls it on one thread a stream. Memory feeds two threads faster than one.
/// Everywhere else, and where it would not pay, this is `build()`.
pub(crate) fn beside<T>(x: &Array, first: &Array, build: impl FnOnce() -> Result<T>) -> Result<T> {
    if !pays(Context::current()?.target, x.shape(), first.shape()) {
        return build();
    }
    aside(build)
}

/// Builds on a CPU, whatever the current device, on a thread that computes it beside whatever is built without.
pub(crate) fn aside<T>(build: impl FnOnce() -> T) -> T {
    SIDE.with(|side| {
        let side = side.get_or_init(|| Stream::new_with_device(&Device::cpu()));
        with_stream(side, build)
    })
}

/// For `x`, `[..., I]`, and its product, `[..., O]`.
fn pays(target: Target, x: &[i32], product: &[i32]) -> bool {
    let size = |shape: &[i32]| shape.iter().map(|&size| size as usize).product::<usize>();
    let lone_row = x.last().is_some_and(|&inputs| size(x) == inputs as usize);
    target == Target::Cpu && lone_row && size(x) * size(product) >= WORTH_A_THREAD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_row_of_a_large_product_on_a_cpu_pays() {
        assert!(pays(Target::Cpu, &[1, 1, 576], &[1, 1, 1536]));
        assert!(pays(Target::Cpu, &[4096], &[4096]));
        assert!(!pays(Target::Cpu, &[1, 576], &[1, 576]), "too small");
        assert!(!pays(Target::Cpu, &[2, 4096], &[2, 4096]), "two rows");
        assert!(!pays(Target::Cpu, &[0, 4096], &[0, 4096]), "no row");
        assert!(!pays(Target::Metal, &[1, 4096], &[1, 4096]));
        assert!(!pays(Target::Cuda, &[1, 4096], &[1, 4096]));
    }
}
