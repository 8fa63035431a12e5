//! Products with packed weights: one row, which is memory, and many, which are arithmetic.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    quant::{QuantizedLinearOptions, QuantizedWeight, quantized_linear},
};
use mlx_rs::{
    Array, Dtype,
    ops::{dequantize, quantized_matmul},
};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference};

const GROUP_SIZE: i32 = 64;

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shape, many) = match setting.target {
        Target::Cpu => (Dtype::Float32, [1024, 1024], 64),
        _ => (Dtype::Bfloat16, [14336, 4096], 1024),
    };
    let problems = [(1, 4), (8, 4), (many, 4), (1, 8)];
    problems.into_iter().map(|(rows, bits)| linear_case(rows, shape, bits, dtype)).collect()
}

/// `rows` vectors times a matrix of `shape`, `[O, I]`.
fn linear_case(rows: i32, shape: [i32; 2], bits: i32, dtype: Dtype) -> Result<Case> {
    let [outputs, inner] = shape;
    let x = normal(1, &[rows, inner], dtype)?;
    let packed = QuantizedWeight::quantize(normal(2, &shape, dtype)?, GROUP_SIZE, bits)?;
    let result_bytes = x.nbytes() / inner as usize * outputs as usize;
    let flops = 2.0 * f64::from(rows) * f64::from(outputs) * f64::from(inner);
    let bytes = x.nbytes() + packed.nbytes() + result_bytes;
    let parts = [packed.weight(), packed.scales(), packed.biases()].map(Array::clone);
    let call = move |x: &[Array], dispatch| {
        quantized_linear(&x[0], &packed, None, QuantizedLinearOptions { dispatch })
    };
    let also = call.clone();
    Ok(Case {
        op: "quantized_linear",
        shape: format!("{rows}x{inner} to {outputs}, {bits} bits"),
        dtype,
        inputs: [x].into_iter().chain(parts).collect(),
        work: if rows <= 8 { Work::Bytes(bytes) } else { Work::Flops(flops) },
        ours: ours(move |x| call(x, Dispatch::Auto)),
        baselines: vec![
            (
                "quantized_matmul",
                mlx(move |x| quantized_matmul(&x[0], &x[1], &x[2], &x[3], true, GROUP_SIZE, bits)),
            ),
            (
                "dequantize, matmul",
                mlx(move |x| {
                    let weight = dequantize(&x[1], &x[2], &x[3], GROUP_SIZE, bits)?;
                    x[0].matmul(weight.transpose()?)
                }),
            ),
        ],
        reference: reference(move |x| also(x, Dispatch::Only(Backend::Reference))),
        // Sums of `inner` terms of deviation one. In f32, one after the other, each addition rounds
        // by 2^-24 of a sum of up to √inner, as often up as down. MLX's CUDA kernels also round each
        // unpacked weight, at most 4, to the dtype, and for one row of 4 bits every sum of up to 16 terms: in bf16 by 2^-8 / √6
        // of it in the mean square, which comes to a deviation of 0.0047 · √inner, and of all sums one is four away.
        tolerance: Tolerance::of(dtype).with_atol(match (dtype, rows, bits) {
            (Dtype::Float32, ..) => inner as f32 / (1 << 22) as f32,
            (Dtype::Bfloat16, 1, 4) => (inner as f32).sqrt() * 2e-2,
            _ => (inner as f32).sqrt() * 8e-3,
        }),
    })
}
