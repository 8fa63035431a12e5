//! Rotary embeddings: a prompt's, and one new token's.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    dispatch::Target,
    rope::{RopeOptions, rope},
};
use mlx_rs::{Array, Dtype, error::Exception, fast};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference, sizes};

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes) = match setting.target {
        Target::Cpu => (Dtype::Float32, [[1, 8, 512, 64], [4, 8, 1, 64]]),
        _ => (Dtype::Bfloat16, [[4, 32, 4096, 128], [32, 32, 1, 128]]),
    };
    Ok(shapes
        .into_iter()
        .map(|shape| rope_case(shape, dtype, setting.dispatch))
        .collect::<Result<_, _>>()?)
}

/// `shape` is `[B, H, S, D]`, the layout that MLX's op has.
fn rope_case(shape: [i32; 4], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    const FIRST: i32 = 1000;
    let inputs = vec![normal(1, &shape, dtype)?];
    let call = |x: &[Array], dispatch| {
        let options = RopeOptions { layout: Layout::Bhsd, dispatch, ..Default::default() };
        rope(&x[0], FIRST, options)
    };
    let [_, _, length, size] = shape;
    // MLX multiplies positions by frequencies in f32: an angle is off by 2^-22 of the position, an
    // element by as much of the other one of its pair, which is at most 6.
    let rounded_angle = 6.0 * (FIRST + length) as f32 / (1 << 22) as f32;
    Ok(Case {
        op: "rope",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes()),
        inputs,
        ours: ours(move |x| call(x, dispatch)),
        baselines: vec![(
            "fast.rope",
            mlx(move |x| fast::rope(&x[0], size, false, 10_000.0, 1.0, FIRST, None)),
        )],
        reference: reference(move |x| call(x, Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype).with_atol(rounded_angle),
    })
}
