//! Layers around a dense product of one row, which is memory: decoding.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    norm::{RmsNormLinearOptions, rms_norm_linear},
};
use mlx_rs::{Array, Dtype, error::Exception, fast, ops::matmul};

use crate::support::{Case, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference};

const EPS: f32 = RmsNormLinearOptions::DEFAULT_EPS;
const REFERENCE: Dispatch = Dispatch::Only(Backend::Reference);

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes): (_, &[[i32; 2]]) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[[1536, 576], [4096, 1024]]),
        _ => (Dtype::Bfloat16, &[[14336, 4096], [6144, 4096], [128_256, 4096], [1536, 576]]),
    };
    let cases = shapes.iter().map(|&shape| rms_norm_linear_case(shape, dtype, setting.dispatch));
    Ok(cases.collect::<Result<_, _>>()?)
}

/// One vector times a matrix of `shape`, `[O, I]`.
fn rms_norm_linear_case(
    shape @ [outputs, inputs]: [i32; 2],
    dtype: Dtype,
    dispatch: Dispatch,
) -> Result<Case, Exception> {
    let x = normal(1, &[1, inputs], dtype)?;
    let (norm_weight, weight) = (normal(2, &[inputs], dtype)?, normal(3, &shape, dtype)?);
    let result_bytes = x.nbytes() / inputs as usize * outputs as usize;
    Ok(Case {
        op: "rms_norm_linear",
        shape: format!("1x{inputs} to {outputs}"),
        dtype,
        work: Work::Bytes(x.nbytes() + norm_weight.nbytes() + weight.nbytes() + result_bytes),
        inputs: vec![x, norm_weight, weight],
        ours: ours(move |x| {
            let options = RmsNormLinearOptions { dispatch, ..Default::default() };
            rms_norm_linear(&x[0], &x[1], &x[2], options)
        }),
        baselines: vec![
            ("fast.rms_norm, matmul", mlx(norm_then_product)),
            ("compiled", compiled(norm_then_product)),
        ],
        reference: reference(|x| {
            let options = RmsNormLinearOptions { dispatch: REFERENCE, ..Default::default() };
            rms_norm_linear(&x[0], &x[1], &x[2], options)
        }),
        // Sums of `inputs` terms of deviation one. In f32, one after the other, each addition rounds by 2^-24 of a sum
        // of up to √inputs, as often up as down; else MLX rounds each normalized number twice, by up to 2^-8 of it and in the
        // mean square by 2^-8 / √6, and of all sums one is five deviations away.
        tolerance: Tolerance::of(dtype).with_atol(match dtype {
            Dtype::Float32 => inputs as f32 / (1 << 22) as f32,
            _ => 5.0 * (inputs as f32 / 3.0).sqrt() / (1 << 8) as f32,
        }),
    })
}

fn norm_then_product(x: &[Array]) -> Result<Array, Exception> {
    matmul(fast::rms_norm(&x[0], Some(&x[1]), EPS)?, x[2].t())
}
