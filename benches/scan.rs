//! Scans along an axis: nothing but memory.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    scan::{
        GatedLinearOptions, ScanOperator, ScanOptions, SsdInput, SsdOptions, affine_scan,
        associative_scan, gated_linear_attention, retention_log_decays, ssd_scan,
    },
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, LogCumsumExpOptions, broadcast_to, concatenate, indexing::TryIndexOp},
};

use crate::support::{
    Case, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes, with_gradients,
};

const REFERENCE: Dispatch = Dispatch::Only(Backend::Reference);

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let dispatch = setting.dispatch;
    let mut cases = Vec::new();
    let Sizes { dtypes, affine, sums, ssd, retention } =
        if setting.target == Target::Cpu { ON_CPU } else { ON_GPU };
    for &dtype in dtypes {
        for &shape in affine {
            cases.push(affine_case(shape, dtype, dispatch)?);
        }
        cases.push(gradient_case(affine[0], dtype, dispatch)?);
        for &(shape, axis) in sums {
            cases.push(sum_case(shape, axis, dtype, dispatch)?);
        }
        for &sizes in ssd {
            cases.push(ssd_case(sizes, dtype, dispatch)?);
        }
        cases.push(retention_case(retention, dtype, dispatch)?);
    }
    cases.push(exponentials_case(sums[0].0, dispatch)?);
    Ok(cases)
}

struct Sizes {
    dtypes: &'static [Dtype],
    affine: &'static [[i32; 3]],
    /// With the axis to scan.
    sums: &'static [(&'static [i32], i32)],
    ssd: &'static [[i32; 5]],
    retention: [i32; 4],
}

const ON_CPU: Sizes = Sizes {
    dtypes: &[Dtype::Float32],
    affine: &[[1, 2048, 256], [1, 65536, 4]],
    sums: &[(&[2, 1024, 512], 1), (&[2048, 512], 1)],
    ssd: &[[1, 1024, 8, 64, 64]],
    retention: [1, 1024, 8, 64],
};

const ON_GPU: Sizes = Sizes {
    dtypes: &[Dtype::Float32, Dtype::Bfloat16],
    affine: &[[4, 2048, 2048], [1, 65536, 256]],
    sums: &[(&[8, 4096, 2048], 1), (&[16384, 4096], 1)],
    ssd: &[[8, 4096, 32, 64, 128], [1, 4096, 32, 64, 128]],
    retention: [4, 4096, 16, 128],
};

fn options(axis: i32, dispatch: Dispatch) -> ScanOptions<'static> {
    ScanOptions { axis, dispatch, ..Default::default() }
}

/// Decays between 0 and 1, and what is added.
fn affine_inputs(shape: [i32; 3], dtype: Dtype) -> Result<Vec<Array>, Exception> {
    let decay = ops::sigmoid(normal(1, &shape, Dtype::Float32)?)?.as_dtype(dtype)?;
    Ok(vec![decay, normal(2, &shape, dtype)?])
}

fn affine_case(shape: [i32; 3], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let inputs = affine_inputs(shape, dtype)?;
    Ok(Case {
        op: "affine_scan",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(3 * inputs[1].nbytes()),
        inputs,
        ours: ours(move |x| affine_scan(&x[0], &x[1], options(1, dispatch))),
        baselines: vec![("doubling", mlx(doubling)), ("compiled", compiled(doubling))],
        reference: reference(|x| affine_scan(&x[0], &x[1], options(1, REFERENCE))),
        // A state sums up what has come, and some of it cancels.
        tolerance: Tolerance::of(dtype).with_atol(2e-5),
    })
}

fn gradient_case(shape: [i32; 3], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let mut inputs = affine_inputs(shape, dtype)?;
    inputs.push(normal(3, &shape, dtype)?);
    let scan = |dispatch| {
        move |x: &[Array]| -> Result<Array, Exception> {
            Ok(affine_scan(&x[0], &x[1], options(1, dispatch))?)
        }
    };
    Ok(Case {
        op: "affine_scan and gradients",
        shape: sizes(&shape),
        dtype,
        // Forward reads two and writes one; back reads decays, results and what flows back, and writes two.
        work: Work::Bytes(8 * inputs[1].nbytes()),
        inputs,
        ours: with_gradients(2, scan(dispatch)),
        baselines: vec![("doubling", with_gradients(2, doubling))],
        reference: {
            let mut run = with_gradients(2, scan(REFERENCE));
            Box::new(move |inputs| {
                let wide = inputs.iter().map(|input| input.as_dtype(Dtype::Float32));
                run(&wide.collect::<Result<Vec<_>, _>>()?)
            })
        },
        // The gradient of a decay is taken from results that were rounded.
        tolerance: match dtype {
            Dtype::Float32 => Tolerance::of(dtype).with_atol(1e-4),
            _ => Tolerance::of(dtype).with_atol(6e-2),
        },
    })
}

/// Passes over twice as many steps each, in f32: what there is in MLX alone.
fn doubling(x: &[Array]) -> Result<Array, Exception> {
    let (mut decay, mut state) = (x[0].as_dtype(Dtype::Float32)?, x[1].as_dtype(Dtype::Float32)?);
    let length = state.dim(1);
    let mut step = 1;
    while step < length {
        let earlier = |array: &Array, nothing: f32| -> Result<Array, Exception> {
            let shape = [array.dim(0), step, array.dim(2)];
            let nothing = broadcast_to(Array::from_f32(nothing), &shape)?;
            concatenate(&[nothing, array.try_index((.., ..length - step))?], 1)
        };
        state = decay.multiply(earlier(&state, 0.0)?)?.add(&state)?;
        decay = decay.multiply(earlier(&decay, 1.0)?)?;
        step *= 2;
    }
    state.as_dtype(x[1].dtype())
}

fn sum_case(shape: &[i32], axis: i32, dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
    let inputs = vec![normal(1, shape, dtype)?];
    Ok(Case {
        op: "associative_scan Add",
        shape: format!("{} along {axis}", sizes(shape)),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes()),
        inputs,
        ours: ours(move |x| associative_scan(&x[0], ScanOperator::Add, options(axis, dispatch))),
        baselines: vec![(
            "cumsum",
            mlx(move |x| {
                let wide = x[0].as_dtype(Dtype::Float32)?;
                wide.cumsum(axis, None, None)?.as_dtype(x[0].dtype())
            }),
        )],
        reference: reference(move |x| {
            associative_scan(&x[0], ScanOperator::Add, options(axis, REFERENCE))
        }),
        // Sums reach some hundreds and come back to zero.
        tolerance: Tolerance::of(dtype).with_atol(2e-3),
    })
}

fn exponentials_case(shape: &[i32], dispatch: Dispatch) -> Result<Case, Exception> {
    let dtype = Dtype::Float32;
    let inputs = vec![normal(1, shape, dtype)?];
    let scan = |x: &[Array], dispatch| {
        associative_scan(&x[0], ScanOperator::LogAddExp, options(1, dispatch))
    };
    Ok(Case {
        op: "associative_scan LogAddExp",
        shape: format!("{} along 1", sizes(shape)),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes()),
        inputs,
        ours: ours(move |x| scan(x, dispatch)),
        baselines: vec![(
            "logcumsumexp",
            mlx(|x| x[0].logcumsumexp(LogCumsumExpOptions { axis: Some(1), ..Default::default() })),
        )],
        reference: reference(move |x| scan(x, REFERENCE)),
        // Thousands of logarithms, each rounded.
        tolerance: Tolerance::of(dtype).with_atol(1e-4),
    })
}

/// Of Mamba-2: `B`, `L`, `H`, `P` and `N`, with one group.
fn ssd_case(
    [batch, length, heads, size, width]: [i32; 5],
    dtype: Dtype,
    dispatch: Dispatch,
) -> Result<Case, Exception> {
    let shape = [batch, length, heads, size];
    let inputs = vec![
        normal(1, &shape, dtype)?,
        ops::sigmoid(normal(2, &shape[..3], dtype)?)?,
        normal(3, &[heads], dtype)?.abs()?.negative()?,
        normal(4, &[batch, length, 1, width], dtype)?,
        normal(5, &[batch, length, 1, width], dtype)?,
    ];
    let scan = |dispatch| {
        move |x: &[Array]| {
            let input = SsdInput { x: &x[0], dt: &x[1], a: &x[2], b: &x[3], c: &x[4] };
            ssd_scan(input, SsdOptions { dispatch, ..Default::default() })
        }
    };
    Ok(Case {
        op: "ssd_scan",
        shape: format!("{} by {width}", sizes(&shape)),
        dtype,
        work: Work::Bytes(inputs.iter().map(Array::nbytes).sum::<usize>() + inputs[0].nbytes()),
        inputs,
        ours: ours(scan(dispatch)),
        baselines: vec![
            ("segments of sums, a loop", mlx(ssd_by_chunks)),
            ("compiled", compiled(ssd_by_chunks)),
        ],
        reference: reference(scan(REFERENCE)),
        // A result sums up hundreds of products of about 10, some of which cancel; in half precision each is rounded, and
        // one rounding of the largest, some 300, is 1.
        tolerance: match dtype {
            Dtype::Float32 => Tolerance::of(dtype).with_atol(1e-3),
            _ => Tolerance::of(dtype).with_atol(2.0),
        },
    })
}

fn ssd_by_chunks(inputs: &[Array]) -> Result<Array, Exception> {
    let [x, dt, a, b, c] = inputs else { return Err(Exception::custom("five inputs")) };
    let dt = dt.as_dtype(Dtype::Float32)?;
    let values = x.multiply(dt.expand_dims(-1)?)?.as_dtype(x.dtype())?;
    by_chunks([c, b, &values], &dt.multiply(a.as_dtype(Dtype::Float32)?)?)
}

/// `B`, `L`, `H` and `D`, of queries, keys and values alike.
fn retention_case(shape: [i32; 4], dtype: Dtype, dispatch: Dispatch) -> Result<Case> {
    let inputs = [1, 2, 3].map(|seed| normal(seed, &shape, dtype));
    let inputs = inputs.into_iter().collect::<Result<Vec<_>, _>>()?;
    let decays = retention_log_decays(shape[2])?;
    let of_steps = broadcast_to(&decays, &shape[..3])?;
    let scale = (shape[3] as f32).sqrt().recip();
    let scan = |dispatch| {
        let decays = decays.clone();
        move |x: &[Array]| {
            let log_decay = Some(&decays);
            let options = GatedLinearOptions { log_decay, dispatch, ..Default::default() };
            gated_linear_attention(&x[0], &x[1], &x[2], options)
        }
    };
    let composed = move |x: &[Array]| {
        let queries = x[0].multiply(Array::from_f32(scale).as_dtype(x[0].dtype())?)?;
        by_chunks([&queries, &x[1], &x[2]], &of_steps)
    };
    Ok(Case {
        op: "gated_linear_attention",
        shape: format!("{}, a retention", sizes(&shape)),
        dtype,
        work: Work::Bytes(4 * inputs[0].nbytes()),
        inputs,
        ours: ours(scan(dispatch)),
        baselines: vec![
            ("segments of sums, a loop", mlx(composed.clone())),
            ("compiled", compiled(composed)),
        ],
        reference: reference(scan(REFERENCE)),
        // Of thousands of steps some is left, each a product of about 1; they are rounded before they are added up.
        tolerance: match dtype {
            Dtype::Float32 => Tolerance::of(dtype).with_atol(1e-3),
            _ => Tolerance::of(dtype).with_atol(1.0),
        },
    })
}

/// Queries and keys `[B, L, G, K]`, values `[B, L, H, V]` and logarithms of decays `[B, L, H]` as models on MLX scan them: chunks
/// one after another, decays as exponentials of segments of sums.
fn by_chunks([queries, keys, values]: [&Array; 3], logarithms: &Array) -> Result<Array, Exception> {
    const CHUNK: i32 = 256;
    let (length, dtype) = (values.dim(1), values.dtype());
    let mut state: Option<Array> = None;
    let mut results = Vec::new();
    for start in (0..length).step_by(CHUNK as usize) {
        let part = |array: &Array| array.try_index((.., start..length.min(start + CHUNK)));
        // [B, H, Q]
        let sums = part(logarithms)?.swap_axes(1, 2)?.cumsum(-1, None, None)?;
        let between = sums.expand_dims(-1)?.subtract(sums.expand_dims(-2)?)?;
        let between = ops::tril(between.exp()?, None)?;
        let (keys, queries) =
            (part(keys)?.transpose_axes(&[0, 2, 3, 1])?, part(queries)?.swap_axes(1, 2)?);
        let values = part(values)?.swap_axes(1, 2)?;
        let weights = queries.matmul(&keys)?.multiply(between)?.as_dtype(dtype)?;
        let mut y = weights.matmul(&values)?;
        let left = sums.try_index((.., .., -1..))?.subtract(&sums)?.exp()?.expand_dims(-1)?;
        let added =
            keys.matmul(values.multiply(left)?.as_dtype(dtype)?)?.as_dtype(Dtype::Float32)?;
        let through = sums.try_index((.., .., -1..))?.exp()?.expand_dims(-1)?;
        state = Some(match state {
            None => added,
            Some(state) => {
                let read = queries.matmul(state.as_dtype(dtype)?)?;
                y = y.add(read.multiply(sums.exp()?.expand_dims(-1)?)?.as_dtype(dtype)?)?;
                state.multiply(through)?.add(added)?
            }
        });
        results.push(y.swap_axes(1, 2)?);
    }
    concatenate(&results, 1)
}
