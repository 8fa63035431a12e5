//! Where kernels were measured to win: the one table that `Dispatch::Auto` goes by.
//!
//! The rows are in `benches/results`. A kernel that wins on large arrays may lose on small ones, where the host's share
//! of a call, some ten microseconds more than for an op of MLX, is most of it; so it is taken from the smallest size on
//! that was measured. A device without an entry runs MLX's own ops.

use super::{Context, Target};

/// A kernel that beats the best of MLX on one kind of device.
struct Win {
    op: &'static str,
    target: Target,
    /// The fewest elements of the largest input.
    elements: usize,
}

const WINS: &[Win] = &[
    // H200, bf16, 16384x4096: 1.20 times MLX's two ops, 1.06 times with gradients; 1.54 times at 4096x16384.
    on_cuda("add_rms_norm", 1 << 26),
    // 3.7 times the best composition, 3.0 times with gradients.
    on_cuda("gated_rms_norm", 1 << 26),
    // 1.54 times MLX's softmax, 2.5 times with gradients; taken for small arrays too, where MLX's has to be kept from NaN by
    // ops of their own.
    on_cuda("softmax", 0),
    // SwiGLU 1.29 times, GeGLU 3.2 times, ReGLU 1.06 times what MLX's compiler fuses; with gradients 2.1, 7.1 and 1.5.
    on_cuda("glu", 1 << 26),
    // 4x32x4096x128 with 8 key heads: 2.0 times two fused ops.
    on_cuda("rope_qk", 1 << 26),
    // The same: 7.3 times four fused ops.
    on_cuda("qk_norm_rope", 1 << 26),
    // What MLX's fused op has no argument for. 4x32x4096x128: the log-sum-exp 18 times, soft cap and ALiBi 13.8 and 13.2
    // times the best composition, soft cap with gradients 7.2 to 9.5 at 1x32x4096x128; 1x8x512x64 0.8 to 1.4 times.
    on_cuda("flash_attention beyond MLX's", 1 << 18),
    // What MLX's does with all scores in memory: heads of 192 and 256 3.2 to 5.9 and 2.8 to 5.2 times, 1x8x1024x256 2.5 times.
    on_cuda("flash_attention", 1 << 21),
    // 4x8x4096x128 causal 2.3 times MLX's op and 1.6 times blocks; 1x8x4096x64 3.4 times, 1x8x1024x64 1.9 times; 1x32x4096x128
    // with a soft cap and gradients 1.3 and 1.4 times.
    on_cuda("flash_attention in f32", 1 << 19),
    // 8 key heads of 128: 8 sequences of 8192 keys as fast as MLX's, of 8321 4.2 times, of 8448 3.8 times; 32 of 4096 0.9 times.
    // MLX is fast at multiples of 256 keys alone, and what is decoded passes through all lengths. For one sequence, or for
    // 1024 keys, the host's share makes the kernel lose.
    on_cuda("decode_attention", 1 << 26),
    // From 2 to 25 times gathered blocks in MLX's op.
    on_cuda("paged_attention", 0),
    // 512 keys: 5.6 times blocks in MLX's op at 4x32x4096x128, 6.5 times at 1x8x4096x128, 14 times at 1x8x65536x128.
    on_cuda("sliding_window_attention", 1 << 22),
    // 4x2048x2048: 35 times doubling, 51 times in bf16; 1x65536x256 32 and 49 times.
    on_cuda("affine_scan", 1 << 24),
    // Sums of 8x4096x2048, 1.51 times MLX's, 4.6 times in bf16; 16384x4096 2.2 and 5.7 times.
    on_cuda("associative_scan along another axis", 1 << 26),
    on_cuda("associative_scan along the last axis", 1 << 26),
    // f32, 16 states: 4x2048x2048 251 times, 1x2048x2048 213 times what MLX composes, with gradients 249 and 143 times.
    on_cuda("selective_scan", 1 << 22),
    // Rows of states. bf16, 8x4096x32x64 by 128 6.0 times plain ops, 1x4096x32x64 4.5 times; f32 1.3 and 0.8 times. Retentions of
    // 4x4096x16x128: 7.7 times, f32 1.7 times.
    on_cuda("fading_scan", 1 << 11),
    on_cuda("fading_scan in f32", 1 << 13),
    // 1x128256 and 32x128256: top-p 8 and 13 times a sort, min-p 7 and 11 times, a plain draw 6 and 5 times MLX's; 1x49152: 8, 6
    // and 8 times. Greedy takes 22 to 29 us where MLX's argmax takes 20 to 29, and tells log-probabilities. Smaller rows were not
    // timed: the kernel's time falls with the row, and the reference stays at 30 ops for a greedy row and at over 100 for
    // another.
    on_cuda("SamplerBatch", 1 << 14),
    // rms_norm and rms_norm_linear are not here: MLX's own ops are as fast or faster. Neither is layer_norm, which takes its
    // kernel whatever the size, because MLX's has a race.
];

const fn on_cuda(op: &'static str, elements: usize) -> Win {
    Win { op, target: Target::Cuda, elements }
}

impl Context {
    /// Whether the kernel of `op` was measured to win on this device for an input of so many elements.
    pub(crate) fn kernel_wins(&self, op: &str, elements: usize) -> bool {
        WINS.iter().any(|win| win.op == op && win.target == self.target && elements >= win.elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn a_kernel_wins_only_where_that_was_measured() {
        let on = |target| Context { target, obstacle: None, settings: Settings::default() };
        assert!(on(Target::Cuda).kernel_wins("add_rms_norm", 1 << 26));
        assert!(!on(Target::Cuda).kernel_wins("add_rms_norm", (1 << 26) - 1));
        assert!(!on(Target::Metal).kernel_wins("add_rms_norm", 1 << 30));
        assert!(!on(Target::Cuda).kernel_wins("rms_norm", 1 << 30));
    }
}
