//! Queries and keys of attention, on their way to it: nothing but memory.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    dispatch::Target,
    rope::{QkNormRopeOptions, RopeOptions, qk_norm_rope, rope_qk},
};
use mlx_rs::{Array, Dtype, error::Exception, fast};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference, sizes};

const EPS: f32 = 1e-5;

/// Queries and keys of a prompt: `[B, H, S, D]`, and how many heads the keys have.
pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, problems): (_, &[([i32; 4], i32)]) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[([1, 8, 128, 64], 2)]),
        _ => (Dtype::Bfloat16, &[([4, 32, 4096, 128], 8), ([4, 32, 4096, 128], 32)]),
    };
    let turned = problems.iter().map(|&(shape, keys)| turn_case(shape, keys, dtype, setting));
    let normed = problems.iter().map(|&(shape, keys)| norm_case(shape, keys, dtype, setting));
    Ok(turned.chain(normed).collect::<Result<_, _>>()?)
}

fn options(dispatch: Dispatch) -> RopeOptions {
    RopeOptions { layout: Layout::Bhsd, dispatch, ..Default::default() }
}

fn fast_rope(x: &Array) -> Result<Array, Exception> {
    fast::rope(x, x.dim(3), false, 10_000.0, 1.0, 0, None)
}

fn normed_rope(x: &Array, weight: &Array) -> Result<Array, Exception> {
    fast_rope(&fast::rms_norm(x, Some(weight), EPS)?)
}

fn head_inputs(
    [batch, heads, length, size]: [i32; 4],
    keys: i32,
    dtype: Dtype,
) -> Result<Vec<Array>, Exception> {
    Ok(vec![
        normal(1, &[batch, heads, length, size], dtype)?,
        normal(2, &[batch, keys, length, size], dtype)?,
        normal(3, &[size], dtype)?,
        normal(4, &[size], dtype)?,
    ])
}

/// MLX multiplies positions by frequencies in f32: an angle is off by 2^-22 of the position, an element by as much of
/// the other one of its pair, which is at most 6, or 30 once it was scaled by a weight.
fn rounded_angle(length: i32, largest: f32) -> f32 {
    largest * length as f32 / (1 << 22) as f32
}

fn turn_case(
    shape: [i32; 4],
    keys: i32,
    dtype: Dtype,
    setting: Setting,
) -> Result<Case, Exception> {
    let inputs = head_inputs(shape, keys, dtype)?;
    let call = |x: &[Array], dispatch| rope_qk(&x[0], &x[1], 0, options(dispatch));
    Ok(Case {
        op: "rope_qk",
        shape: format!("{}, {keys} key heads", sizes(&shape)),
        dtype,
        work: Work::Bytes(2 * (inputs[0].nbytes() + inputs[1].nbytes())),
        inputs,
        ours: ours(move |x| call(x, setting.dispatch)),
        baselines: vec![("fast.rope twice", mlx(|x| Ok((fast_rope(&x[0])?, fast_rope(&x[1])?))))],
        reference: reference(move |x| call(x, Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype).with_atol(rounded_angle(shape[2], 6.0)),
    })
}

fn norm_case(
    shape: [i32; 4],
    keys: i32,
    dtype: Dtype,
    setting: Setting,
) -> Result<Case, Exception> {
    let inputs = head_inputs(shape, keys, dtype)?;
    let call = |x: &[Array], dispatch| {
        let options = QkNormRopeOptions { rope: options(dispatch), ..Default::default() };
        qk_norm_rope((&x[0], &x[2]), (&x[1], &x[3]), 0, options)
    };
    Ok(Case {
        op: "qk_norm_rope",
        shape: format!("{}, {keys} key heads", sizes(&shape)),
        dtype,
        work: Work::Bytes(2 * (inputs[0].nbytes() + inputs[1].nbytes())),
        inputs,
        ours: ours(move |x| call(x, setting.dispatch)),
        baselines: vec![(
            "fast.rms_norm, fast.rope twice",
            mlx(|x| Ok((normed_rope(&x[0], &x[2])?, normed_rope(&x[1], &x[3])?))),
        )],
        reference: reference(move |x| call(x, Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype).with_atol(rounded_angle(shape[2], 30.0)),
    })
}
