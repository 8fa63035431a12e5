//! Attention to the keys nearby, at lengths that show how time grows.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{SlidingWindowOptions, sliding_window_attention},
    dispatch::Target,
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention},
    ops::{arange, concatenate, indexing::TryIndexOp, select},
};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference, sizes};

const WINDOW: i32 = 512;

/// Queries of a call, where a user of MLX makes several.
const BLOCK: i32 = 2048;

/// The longest for which MLX can hold a mask of all scores, and the definition the scores.
const MASKED: i32 = 16384;

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes): (_, &[[i32; 4]]) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[[1, 8, 2048, 64]]),
        _ => (
            Dtype::Bfloat16,
            &[[4, 32, 4096, 128], [1, 8, 4096, 128], [1, 8, 16384, 128], [1, 8, 65536, 128]],
        ),
    };
    let cases = shapes.iter().map(|&shape| case(shape, dtype, setting.dispatch));
    Ok(cases.collect::<Result<_, _>>()?)
}

fn case(shape: [i32; 4], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let [batch, heads, length, size] = shape;
    let inputs = (1..4).map(|seed| normal(seed, &shape, dtype)).collect::<Result<Vec<_>, _>>()?;
    let seen = f64::from(length) * f64::from(WINDOW + 1);
    let mut baselines = vec![("fast.sdpa by blocks", mlx(blocked))];
    let mut definition = Backend::Builtin;
    if length <= MASKED {
        baselines.push(("fast.sdpa, band mask", mlx(masked)));
        definition = Backend::Reference;
    }
    Ok(Case {
        op: "sliding_window_attention",
        shape: format!("{}, window {WINDOW}", sizes(&shape)),
        dtype,
        work: Work::Flops(4.0 * f64::from(batch * heads) * seen * f64::from(size)),
        inputs,
        ours: ours(move |x| attend(x, dispatch)),
        baselines,
        reference: reference(move |x| attend(x, Dispatch::Only(definition))),
        // Weights are rounded to the dtype before they meet the values, of which the first queries see a handful.
        tolerance: Tolerance::of(dtype).with_atol(match dtype {
            Dtype::Float32 => 1e-5,
            _ => 1.6e-2,
        }),
    })
}

fn attend(x: &[Array], dispatch: Dispatch) -> mlx_primitives::Result<Array> {
    let options = SlidingWindowOptions { layout: Layout::Bhsd, dispatch, ..Default::default() };
    sliding_window_attention(&x[0], &x[1], &x[2], WINDOW, options)
}

/// In one call.
fn masked(x: &[Array]) -> Result<Array, Exception> {
    block(x, 0, x[0].dim(2))
}

/// In one call for each block of queries, over the keys that any of them sees.
fn blocked(x: &[Array]) -> Result<Array, Exception> {
    let starts = (0..x[0].dim(2)).step_by(BLOCK as usize);
    let blocks = starts.map(|start| block(x, start, (start + BLOCK).min(x[0].dim(2))));
    concatenate(&blocks.collect::<Result<Vec<_>, _>>()?, 2)
}

fn block(x: &[Array], start: i32, end: i32) -> Result<Array, Exception> {
    let first = (start - WINDOW).max(0);
    let place = |start, end| arange::<i32, i32>(start, end, None);
    let distance = place(start, end)?.expand_dims(-1)?.subtract(place(first, end)?)?;
    let seen = distance.ge(Array::from_int(0))?;
    let seen = seen.logical_and(distance.le(Array::from_int(WINDOW))?)?;
    let hidden = Array::from_f32(f32::NEG_INFINITY);
    let mask = select(seen, Array::from_f32(0.0), hidden)?.as_dtype(x[0].dtype())?;
    let queries = x[0].try_index((.., .., start..end, ..))?;
    let [keys, values] =
        [x[1].try_index((.., .., first..end, ..))?, x[2].try_index((.., .., first..end, ..))?];
    let scale = (x[0].dim(3) as f32).sqrt().recip();
    let mask = ScaledDotProductAttentionMask::Array(&mask);
    scaled_dot_product_attention(queries, keys, values, scale, mask, None)
}
