//! Closeness, by one table of tolerances.

use mlx_primitives::{Backend, dispatch::Target};
use mlx_rs::{Array, Dtype};

use super::tensor::{Tensor, unravel};

/// `|got - expected| <= atol + rtol * |expected|`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) rtol: f64,
    pub(crate) atol: f64,
}

/// Operations whose rounding is inherently larger than one rounding of the result.
const WIDER: &[Wider] = &[
    Wider {
        ops: &["associative_scan Add"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 1e-5 },
        why: "sums of up to 1100 numbers reach 40 and come back to zero: off by 3.5e-6 there",
    },
    Wider {
        ops: &["affine_scan"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 5e-6 },
        why: "a state sums up what has come, and some of it cancels: off by 2.1e-6",
    },
    Wider {
        ops: &["affine_scan, long"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 1e-4 },
        why: "states reach 30, and what rounded there is left where they cancel: off by 9e-6",
    },
    Wider {
        ops: &["ssd_scan, long"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 1e-4 },
        why: "a state of 1e4 steps is some tens, and what rounded there is left where a query cancels it",
    },
    Wider {
        ops: &["affine_scan, long memory"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 5e-3 },
        why: "a decay of 0.9999 that is off by one rounding, 6e-8, moves a state of 100 by 0.06",
    },
    Wider {
        ops: &[
            "flash_attention",
            "chunked_cross_attention on builtin",
            "sliding_window_attention on builtin",
            "sliding_window_attention on kernel",
        ],
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 2e-3 },
        why: SCORES_ARE_ROUNDED,
    },
    Wider {
        ops: &[
            "flash_attention",
            "chunked_cross_attention on builtin",
            "sliding_window_attention on builtin",
            "sliding_window_attention on kernel",
        ],
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 1.6e-2 },
        why: SCORES_ARE_ROUNDED,
    },
    Wider {
        ops: &["selective_scan"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 3e-6 },
        why: "an NVIDIA GPU's powers of two are off by 2^-22, whatever cancels in a state: 1.2e-6 of states of 1",
    },
    Wider {
        ops: ROUNDED_MATRICES,
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 5e-6 },
        why: "an NVIDIA GPU's exponentials, and products of floats in two parts, are off by 2^-22, whatever cancels: 1.7e-6 of sums of 1",
    },
    Wider {
        ops: ROUNDED_MATRICES,
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 1e-2 },
        why: FACTORS_ARE_ROUNDED,
    },
    Wider {
        ops: ROUNDED_MATRICES,
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 8e-2 },
        why: FACTORS_ARE_ROUNDED,
    },
    Wider {
        ops: &["performer_attention"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 5e-6 },
        why: "an exponent of 16 is off by 2^-20 in f32, and so a weight by as much of itself, whatever cancels",
    },
    Wider {
        ops: &["rope by MLX"],
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 4e-3 },
        why: "on the CPU MLX rounds sines and products to f16: by 2^-11 of the pair, four times",
    },
    Wider {
        ops: &["rope by MLX"],
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 3e-2 },
        why: "the same, by 2^-8",
    },
    Wider {
        ops: &["layer_norm on builtin", "add_layer_norm on builtin"],
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 2e-3 },
        why: LAYER_NORM_ROUNDS_EARLY,
    },
    Wider {
        ops: &["layer_norm on builtin", "add_layer_norm on builtin"],
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 1.6e-2 },
        why: LAYER_NORM_ROUNDS_EARLY,
    },
    Wider {
        ops: &["rms_norm_linear on builtin"],
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 2e-3 },
        why: NORMED_ROWS_ARE_ROUNDED,
    },
    Wider {
        ops: &["rms_norm_linear on builtin"],
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 1.6e-2 },
        why: NORMED_ROWS_ARE_ROUNDED,
    },
    Wider {
        ops: &["quantized_linear"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 1e-5, atol: 3e-6 },
        why: "a sum rounds in proportion to its terms, not to what is left where they cancel",
    },
    Wider {
        ops: &["quantized_linear on builtin"],
        dtype: Dtype::Float16,
        tolerance: Tolerance { rtol: 1e-3, atol: 1e-2 },
        why: WEIGHTS_ARE_ROUNDED,
    },
    Wider {
        ops: &["quantized_linear on builtin"],
        dtype: Dtype::Bfloat16,
        tolerance: Tolerance { rtol: 8e-3, atol: 8e-2 },
        why: WEIGHTS_ARE_ROUNDED,
    },
    Wider {
        ops: &["softmax of 128256 on builtin", "softmax of 128256 on reference"],
        dtype: Dtype::Float32,
        tolerance: Tolerance { rtol: 2e-4, atol: 1e-6 },
        why: LONG_SUMS_DRIFT,
    },
];

const ROUNDED_MATRICES: &[&str] = &[
    "ssd_scan on a GPU",
    "ssd_scan on kernel",
    "gated_linear_attention on a GPU",
    "gated_linear_attention on kernel",
    "gated_delta_rule on a GPU",
];

const FACTORS_ARE_ROUNDED: &str = "On a GPU, and by a kernel, factors are rounded to the dtype before matrices are \
    multiplied: each term of a sum by up to 2^-11 of it in f16 and 2^-8 in bf16, whatever cancels. Seen: 8.2e-3 of a sum \
    of 1.6 in f16.";

const LONG_SUMS_DRIFT: &str = "On a CPU MLX adds up a row in one f32 for each lane of its vectors, \
    one number after another: off by 9e-5.";

const WEIGHTS_ARE_ROUNDED: &str = "MLX's CUDA kernels round scale times integer and the sum with \
    the bias to the dtype: each of 64 weights is off by up to 2^-11 of 3 in f16, eight times that \
    in bf16, and what they multiply is not cancelled. On a CPU both backends compute in f32.";

const NORMED_ROWS_ARE_ROUNDED: &str = "MLX rounds the normalized row before it is multiplied, each \
    number by up to 2^-11 of itself in f16 and 2^-8 in bf16, whatever cancels in the product.";

const LAYER_NORM_ROUNDS_EARLY: &str = "MLX rounds the normalized row and its product with the \
    weight before it adds the bias, which may cancel what they rounded.";

const SCORES_ARE_ROUNDED: &str = "The kernels round weights to the dtype, and MLX's fused attention, \
    where it runs as plain ops, scaled queries and scores too. A score of 4 is then off by up to 2^-9 in f16 and \
    2^-6 in bf16, so each weight by as much of itself, whatever cancels in the sum of values.";

struct Wider {
    ops: &'static [&'static str],
    dtype: Dtype,
    tolerance: Tolerance,
    #[allow(dead_code, reason = "read by people")]
    why: &'static str,
}

impl Tolerance {
    /// The same computation on the same values.
    pub(crate) const EXACT: Self = Self { rtol: 0.0, atol: 0.0 };

    /// f32 gradients accumulate more roundings than a forward pass.
    pub(crate) const GRADIENT: Self = Self { rtol: 1e-4, atol: 2e-5 };

    /// A layer is a dozen operations deep, and each rounds.
    pub(crate) const LAYER: Self = Self { rtol: 1e-4, atol: 1e-5 };

    /// That of `op`, where a GPU may round more than a CPU.
    pub(crate) fn here(op: &str, dtype: Dtype) -> Self {
        let on_cpu = Target::current().unwrap() == Target::Cpu;
        let gpu = (!on_cpu).then(|| Self::wider(&format!("{op} on a GPU"), dtype)).flatten();
        gpu.unwrap_or_else(|| Self::of(op, dtype))
    }

    /// The tolerance of `op` for results of `dtype`.
    pub(crate) fn of(op: &str, dtype: Dtype) -> Self {
        Self::wider(op, dtype).unwrap_or_else(|| Self::default_of(dtype))
    }

    /// The tolerance of `op` on one backend, which may have an entry of its own.
    pub(crate) fn on(op: &str, backend: Backend, dtype: Dtype) -> Self {
        let own = Self::wider(&format!("{op} on {backend}"), dtype);
        own.unwrap_or_else(|| Self::of(op, dtype))
    }

    fn wider(op: &str, dtype: Dtype) -> Option<Self> {
        let entry = WIDER.iter().find(|wider| wider.ops.contains(&op) && wider.dtype == dtype);
        entry.map(|wider| wider.tolerance)
    }

    fn default_of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float32 => Self { rtol: 1e-5, atol: 1e-6 },
            Dtype::Float16 => Self { rtol: 1e-3, atol: 1e-4 },
            // Eight bits of mantissa: half a unit in the last place is 2^-9, and a composition
            // may round twice.
            Dtype::Bfloat16 => Self { rtol: 8e-3, atol: 1e-3 },
            other => panic!("no tolerance for {other:?}"),
        }
    }

    fn accepts(self, expected: f64, got: f64) -> bool {
        if expected.is_infinite() || got.is_infinite() {
            return expected == got;
        }
        (got - expected).abs() <= self.atol + self.rtol * expected.abs()
    }
}

/// Panics at the first element of `got` that is not close to `expected`, naming `what`.
pub(crate) fn assert_close(what: &str, got: &Array, expected: &Tensor, tolerance: Tolerance) {
    let got = Tensor::of(got);
    assert_eq!(got.shape, expected.shape, "{what}: shape");
    let bad = (0..got.values.len())
        .find(|&flat| !tolerance.accepts(expected.values[flat], got.values[flat]));
    if let Some(flat) = bad {
        panic!(
            "{what}: at {:?} expected {} but got {} ({tolerance:?})",
            unravel(flat, &got.shape),
            expected.values[flat],
            got.values[flat]
        );
    }
}
