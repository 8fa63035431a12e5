//! Normalizations: one pass over memory if all goes well.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    norm::{LayerNormOptions, RmsNormOptions, layer_norm, rms_norm},
};
use mlx_rs::{Array, Dtype, error::Exception, fast};

use crate::support::{
    Case, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes,
};

const EPS: f32 = 1e-5;
const REFERENCE: Dispatch = Dispatch::Only(Backend::Reference);

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes): (_, &[[i32; 2]]) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[[2048, 1024], [1, 4096]]),
        _ => (Dtype::Bfloat16, &[[16384, 4096], [131_072, 4096], [32, 4096]]),
    };
    let rms = shapes.iter().map(|&shape| rms_norm_case(shape, dtype, setting.dispatch));
    let layer = shapes.iter().map(|&shape| layer_norm_case(shape, dtype, setting.dispatch));
    Ok(rms.chain(layer).collect::<Result<_, _>>()?)
}

fn rms_norm_case(shape: [i32; 2], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let inputs = vec![normal(1, &shape, dtype)?, normal(2, &shape[1..], dtype)?];
    Ok(Case {
        op: "rms_norm",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes() + inputs[1].nbytes()),
        inputs,
        ours: ours(move |x| {
            rms_norm(&x[0], &x[1], RmsNormOptions { dispatch, ..Default::default() })
        }),
        baselines: vec![
            ("fast.rms_norm", mlx(|x| fast::rms_norm(&x[0], Some(&x[1]), EPS))),
            ("compiled", compiled(composed_rms_norm)),
        ],
        reference: reference(|x| {
            rms_norm(&x[0], &x[1], RmsNormOptions { dispatch: REFERENCE, ..Default::default() })
        }),
        tolerance: Tolerance::of(dtype),
    })
}

fn composed_rms_norm(x: &[Array]) -> Result<Array, Exception> {
    let wide = x[0].as_dtype(Dtype::Float32)?;
    let scale = wide.square()?.mean_axis(-1, true)?.add(Array::from_f32(EPS))?.rsqrt()?;
    wide.multiply(scale)?.multiply(&x[1])?.as_dtype(x[0].dtype())
}

fn layer_norm_case(shape: [i32; 2], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let row = &shape[1..];
    let inputs = vec![normal(1, &shape, dtype)?, normal(2, row, dtype)?, normal(3, row, dtype)?];
    Ok(Case {
        op: "layer_norm",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes() + 2 * inputs[1].nbytes()),
        inputs,
        ours: ours(move |x| {
            let options = LayerNormOptions { dispatch, ..Default::default() };
            layer_norm(&x[0], &x[1], &x[2], options)
        }),
        baselines: vec![
            ("fast.layer_norm", mlx(|x| fast::layer_norm(&x[0], &x[1], &x[2], EPS))),
            ("compiled", compiled(composed_layer_norm)),
        ],
        reference: reference(|x| {
            let options = LayerNormOptions { dispatch: REFERENCE, ..Default::default() };
            layer_norm(&x[0], &x[1], &x[2], options)
        }),
        // MLX rounds the normalized row, at most 5, and its product with the weight before it adds
        // the bias, which may cancel what they rounded.
        tolerance: match dtype {
            Dtype::Float32 => Tolerance::of(dtype),
            _ => Tolerance::of(dtype).with_atol(6e-2),
        },
    })
}

fn composed_layer_norm(x: &[Array]) -> Result<Array, Exception> {
    let wide = x[0].as_dtype(Dtype::Float32)?;
    let centred = wide.subtract(wide.mean_axis(-1, true)?)?;
    let scale = centred.square()?.mean_axis(-1, true)?.add(Array::from_f32(EPS))?.rsqrt()?;
    centred.multiply(scale)?.multiply(&x[1])?.add(&x[2])?.as_dtype(x[0].dtype())
}
