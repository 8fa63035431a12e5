//! Functions of one element or of two: nothing but memory.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    activation::{Activation, GluOptions, glu},
    dispatch::Target,
};
use mlx_rs::{Array, Dtype, error::Exception, nn, ops};

use crate::support::{
    Case, Run, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes,
};

const REFERENCE: Dispatch = Dispatch::Only(Backend::Reference);

/// An activation as a user of mlx-rs has it, in f32 where its constants are, and what that is called.
type Theirs = (&'static str, fn(&Array) -> Result<Array, Exception>);

const GLUS: [(&str, Activation, Theirs); 3] = [
    ("glu silu", Activation::Silu, ("sigmoid, multiply", |x| ops::sigmoid(x)?.multiply(x))),
    ("glu gelu", Activation::Gelu, ("nn.gelu, multiply", |x| nn::gelu(x))),
    ("glu gelu_tanh", Activation::GeluTanh, ("nn.gelu_approximate", |x| nn::gelu_approximate(x))),
];

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shape) = match setting.target {
        Target::Cpu => (Dtype::Float32, [512, 1536]),
        _ => (Dtype::Bfloat16, [16384, 4096]),
    };
    let glus = GLUS.map(|(op, activation, theirs)| {
        glu_case(op, activation, theirs, shape, dtype, setting.dispatch)
    });
    let pointwise = pointwise_case(shape, dtype);
    Ok(glus.into_iter().chain([pointwise]).collect::<Result<_, _>>()?)
}

fn glu_case(
    op: &'static str,
    activation: Activation,
    (name, function): Theirs,
    shape: [i32; 2],
    dtype: Dtype,
    dispatch: Dispatch,
) -> Result<Case, Exception> {
    let inputs = vec![normal(1, &shape, dtype)?, normal(2, &shape, dtype)?];
    let call = move |x: &[Array], dispatch| {
        glu(&x[0], &x[1], GluOptions { activation, dispatch, ..Default::default() })
    };
    let theirs = move |x: &[Array]| function(&x[0])?.multiply(&x[1])?.as_dtype(dtype);
    Ok(Case {
        op,
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(3 * inputs[0].nbytes()),
        inputs,
        ours: ours(move |x| call(x, dispatch)),
        baselines: with_and_without_compiler(name, theirs),
        reference: reference(move |x| call(x, REFERENCE)),
        tolerance: Tolerance::of(dtype),
    })
}

fn pointwise_case(shape: [i32; 2], dtype: Dtype) -> Result<Case, Exception> {
    let inputs = vec![normal(1, &shape, dtype)?];
    Ok(Case {
        op: "gelu_tanh",
        shape: sizes(&shape),
        dtype,
        work: Work::Bytes(2 * inputs[0].nbytes()),
        inputs,
        ours: ours(|x| Activation::GeluTanh.apply(&x[0])),
        baselines: with_and_without_compiler("nn.gelu_approximate", move |x| {
            nn::gelu_approximate(&x[0])?.as_dtype(dtype)
        }),
        reference: reference(|x| Activation::GeluTanh.apply_on(&x[0], REFERENCE)),
        tolerance: Tolerance::of(dtype),
    })
}

fn with_and_without_compiler(
    name: &'static str,
    run: impl Fn(&[Array]) -> Result<Array, Exception> + Copy + 'static,
) -> Vec<(&'static str, Run)> {
    vec![(name, mlx(run)), ("compiled", compiled(run))]
}
