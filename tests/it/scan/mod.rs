//! Scans, and the recurrences that are made of them.

mod affine;
mod associative;
mod cases;
mod causal_conv;
mod complex;
mod gated;
mod generic;
mod gradient;
mod long;
mod oracle;
mod properties;
mod refusal;
mod selective;
mod selective_oracle;
mod ssd;

use mlx_primitives::{Backend, Dispatch, Result, dispatch::Target};
use mlx_rs::{Array, Dtype, error::Exception, transforms::fallible_vjp};

use crate::support::{
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

/// How exact the f32 states are where matrices make them: a GPU, and a kernel, multiplies those in the dtype of the arrays.
fn dtype_of_states(backend: Backend, dtype: Dtype) -> Dtype {
    let rounded = backend == Backend::Kernel || Target::current().unwrap() != Target::Cpu;
    if rounded { dtype } else { Dtype::Float32 }
}

/// The tolerance of `op` where factors of matrices may be rounded.
fn tolerance(op: &str, backend: Backend, dtype: Dtype) -> Tolerance {
    match backend == Backend::Kernel {
        true => Tolerance::here(&format!("{op} on {backend}"), dtype),
        false => Tolerance::here(op, dtype),
    }
}

/// Each backend's gradients against those of the reference, of a result and the state after it: at sizes that finite
/// differences would take minutes for.
fn assert_gradients_alike(
    op: &str,
    what: &str,
    inputs: &[Array],
    run: impl Fn(&[Array], Dispatch) -> Result<(Array, Array)>,
) {
    let (y, state) = run(inputs, Dispatch::Auto).unwrap();
    let cotangents = [normal(10, y.shape(), y.dtype()), normal(11, state.shape(), Dtype::Float32)];
    let gradients = |backend| {
        let both = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            let (y, state) = run(inputs, Dispatch::Only(backend))?;
            Ok(vec![y, state])
        };
        fallible_vjp(both, inputs, &cotangents).unwrap().1
    };
    let expected = gradients(Backend::Reference);
    on_each_backend(
        op,
        |dispatch| run(inputs, dispatch),
        |backend, _| {
            for (which, (got, expected)) in gradients(backend).iter().zip(&expected).enumerate() {
                let what = format!("{what} on {backend}: gradient {which}");
                let tolerance = match got.dtype() {
                    Dtype::Float32 => Tolerance::GRADIENT,
                    dtype => Tolerance::of(op, dtype),
                };
                assert_close(&what, got, &Tensor::of(expected), tolerance);
            }
        },
    );
}
