//! The selective scan, forward and with its gradient, beside what MLX's ops compose to.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    kernel::inference,
    scan::{SelectiveScanOptions, SelectiveStepOptions, selective_scan, selective_state_update},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, indexing::TryIndexOp, logaddexp, pad},
};

use crate::support::{
    Case, Run, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes,
    with_gradients,
};

const STATES: i32 = 16;

/// Where a decay is near one, a state remembers a thousand steps: an exponential that is off by 2^-22, as those of an NVIDIA
/// GPU are, moves a state of 10 by up to 3e-3.
const STATE_ROUNDING: f32 = 3e-3;

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let Setting { target, dispatch } = setting;
    let on_cpu = target == Target::Cpu;
    let (shape, trained) =
        if on_cpu { ([1, 256, 256], [1, 128, 128]) } else { ([4, 2048, 2048], [1, 2048, 2048]) };
    let dtypes =
        if on_cpu { &[Dtype::Float32][..] } else { &[Dtype::Float32, Dtype::Bfloat16][..] };
    let mut cases = Vec::new();
    for &dtype in dtypes {
        cases.push(forward(shape, dtype, dispatch)?);
        cases.push(forward(trained, dtype, dispatch)?);
        cases.push(backward(trained, dtype, dispatch)?);
        if !on_cpu {
            cases.push(backward(shape, dtype, dispatch)?);
        }
    }
    cases.push(step([if on_cpu { 1 } else { 64 }, 2048], dispatch)?);
    Ok(cases)
}

/// `u`, `delta`, `a`, `b`, `c`, `d` and the bias of `delta`, as a model has them.
fn inputs(shape: [i32; 3], dtype: Dtype) -> Result<Vec<Array>, Exception> {
    let [batch, length, channels] = shape;
    let by_state = [batch, length, STATES];
    let a = normal(3, &[channels, STATES], dtype)?.abs()?.negative()?;
    let share = Array::from_f32(0.25).as_dtype(dtype)?;
    Ok(vec![
        normal(1, &shape, dtype)?,
        normal(2, &shape, dtype)?,
        a,
        normal(4, &by_state, dtype)?,
        normal(5, &by_state, dtype)?.multiply(share)?,
        normal(6, &[channels], dtype)?,
        normal(7, &[channels], dtype)?,
    ])
}

fn scan(x: &[Array], dispatch: Dispatch) -> mlx_primitives::Result<Array> {
    let options = SelectiveScanOptions {
        d: Some(&x[5]),
        delta_bias: Some(&x[6]),
        delta_softplus: true,
        dispatch,
        ..Default::default()
    };
    selective_scan(&x[0], &x[1], &x[2], &x[3], &x[4], options)
}

fn forward(shape: [i32; 3], dtype: Dtype, dispatch: Dispatch) -> Result<Case> {
    let inputs = inputs(shape, dtype)?;
    Ok(Case {
        op: "selective_scan",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(inputs.iter().map(Array::nbytes).sum::<usize>() + inputs[0].nbytes()),
        inputs,
        // No gradient follows.
        ours: ours(move |x| inference(|| scan(x, dispatch))),
        baselines: vec![
            ("doubling", mlx(by_doubling)),
            ("compiled", compiled(by_doubling)),
            ("loop", mlx(by_loop)),
        ],
        reference: reference(|x| scan(x, Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype).with_atol(STATE_ROUNDING),
    })
}

/// Results and gradients of all inputs: what training runs.
fn backward(shape: [i32; 3], dtype: Dtype, dispatch: Dispatch) -> Result<Case> {
    let mut inputs = inputs(shape, dtype)?;
    // The gradient of a rate near zero sums up states that forget nothing: 7e5, rounded.
    inputs[2] = inputs[2].subtract(Array::from_f32(0.5).as_dtype(dtype)?)?;
    // Forward reads the inputs and writes the result; backward reads them and what flows back, and writes as many.
    let bytes = 3 * inputs.iter().map(Array::nbytes).sum::<usize>() + 2 * inputs[0].nbytes();
    let by = |dispatch| with_gradients(7, move |x: &[Array]| Ok(scan(x, dispatch)?));
    inputs.push(normal(8, &shape, dtype)?);
    Ok(Case {
        op: "selective_scan",
        shape: format!("{} with gradients", sizes(&shape)),
        dtype,
        work: Work::Bytes(bytes),
        inputs,
        ours: by(dispatch),
        baselines: vec![("doubling", with_gradients(7, by_doubling))],
        reference: widened(by(Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype)
            .with_atol(STATE_ROUNDING.max(summed(shape[0] * shape[1], dtype))),
    })
}

fn step(shape: [i32; 2], dispatch: Dispatch) -> Result<Case> {
    let (dtype, [batch, channels]) = (Dtype::Float32, shape);
    let mut inputs = inputs([batch, 1, channels], dtype)?;
    for which in [0, 1, 3, 4] {
        inputs[which] = inputs[which].squeeze_axes(&[1])?;
    }
    inputs.push(normal(8, &[batch, channels, STATES], dtype)?);
    let update = move |x: &[Array], dispatch| {
        let options = SelectiveStepOptions {
            d: Some(&x[5]),
            delta_bias: Some(&x[6]),
            delta_softplus: true,
            dispatch,
            ..Default::default()
        };
        selective_state_update(&x[7], &x[0], &x[1], &x[2], &x[3], &x[4], options)
    };
    let bytes = inputs.iter().map(Array::nbytes).sum::<usize>();
    Ok(Case {
        op: "selective_state_update",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(bytes + inputs[0].nbytes() + inputs[7].nbytes()),
        inputs,
        ours: ours(move |x| update(x, dispatch)),
        baselines: vec![("step", mlx(one_step)), ("compiled", compiled(one_step))],
        reference: reference(move |x| update(x, Dispatch::Only(Backend::Reference))),
        tolerance: Tolerance::of(dtype).with_atol(STATE_ROUNDING),
    })
}

/// The gradient of what all steps share is a sum over them, of terms of up to ten or so.
fn summed(steps: i32, dtype: Dtype) -> f32 {
    let unit = if dtype == Dtype::Float32 { f32::EPSILON } else { 2.0_f32.powi(-8) };
    10.0 * unit * (steps as f32).sqrt()
}

/// `run` with its half-precision inputs in f32.
fn widened(mut run: Run) -> Run {
    Box::new(move |inputs| {
        let wide = inputs.iter().map(|x| x.as_dtype(Dtype::Float32));
        run(&wide.collect::<Result<Vec<_>, _>>()?)
    })
}

fn float(x: &Array) -> Result<Array, Exception> {
    x.as_dtype(Dtype::Float32)
}

fn steps(x: &[Array]) -> Result<Array, Exception> {
    logaddexp(float(&x[1])?.add(float(&x[6])?)?, Array::from_f32(0.0))
}

/// All decays and all that enters, `[B, L, D, N]`.
fn entering(x: &[Array]) -> Result<[Array; 2], Exception> {
    let delta = steps(x)?;
    let decays = delta.expand_dims(-1)?.multiply(float(&x[2])?)?.exp()?;
    let entering = delta.multiply(float(&x[0])?)?.expand_dims(-1)?;
    Ok([decays, entering.multiply(float(&x[3])?.expand_dims(-2)?)?])
}

/// The outputs of states, `[B, L, D, N]`.
fn leaving(x: &[Array], states: &Array) -> Result<Array, Exception> {
    let y = states.matmul(float(&x[4])?.expand_dims(-1)?)?.squeeze_axes(&[-1])?;
    y.add(float(&x[0])?.multiply(float(&x[5])?)?)?.as_dtype(x[0].dtype())
}

/// In log L rounds: each step takes in what was gathered before it, over twice as many steps each time.
fn by_doubling(x: &[Array]) -> Result<Array, Exception> {
    let [mut decays, mut states] = entering(x)?;
    let length = decays.dim(1);
    let mut reach = 1;
    while reach < length {
        let later = decays.try_index((.., reach..))?;
        let gathered = later.multiply(states.try_index((.., ..-reach))?)?;
        let grown = later.multiply(decays.try_index((.., ..-reach))?)?;
        states = states.add(pad(gathered, &[(0, 0), (reach, 0), (0, 0), (0, 0)], None, None)?)?;
        decays = concatenate(&[decays.try_index((.., ..reach))?, grown], 1)?;
        reach *= 2;
    }
    leaving(x, &states)
}

/// One step after another.
fn by_loop(x: &[Array]) -> Result<Array, Exception> {
    let [decays, entering] = entering(x)?;
    let mut states: Vec<Array> = Vec::new();
    for t in 0..decays.dim(1) {
        let added = entering.try_index((.., t..t + 1))?;
        states.push(match states.last() {
            None => added,
            Some(state) => decays.try_index((.., t..t + 1))?.multiply(state)?.add(added)?,
        });
    }
    leaving(x, &concatenate(&states, 1)?)
}

fn one_step(x: &[Array]) -> Result<(Array, Array), Exception> {
    let (u, delta) = (float(&x[0])?, steps(x)?);
    let decays = delta.expand_dims(-1)?.multiply(float(&x[2])?)?.exp()?;
    let entering = delta.multiply(&u)?.expand_dims(-1)?.multiply(float(&x[3])?.expand_dims(1)?)?;
    let state = x[7].multiply(decays)?.add(entering)?;
    let y = state.matmul(float(&x[4])?.expand_dims(-1)?)?.squeeze_axes(&[-1])?;
    Ok((y.add(u.multiply(float(&x[5])?)?)?.as_dtype(x[0].dtype())?, state))
}
