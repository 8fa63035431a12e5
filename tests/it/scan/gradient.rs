//! Gradients in every mode against finite differences of the oracle.

use mlx_primitives::{
    Backend, Dispatch, Result,
    scan::{
        ScanOperator, ScanOptions, affine_scan, affine_scan_with_state, associative_scan_with_state,
    },
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, indexing::TryIndexOp},
    transforms::fallible_vjp,
};

use super::{
    affine::decays,
    oracle::{self, Ask},
};
use crate::support::{
    backends::{on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::{gradients_on_backends, gradients_on_each_backend},
    sample::normal,
    tensor::Tensor,
};

const SEGMENTS: [i32; 4] = [0, 3, 3, 7];

/// Result and last state in a row, so that both have a share in the loss.
fn joined([y, last]: [Tensor; 2]) -> Tensor {
    let values = [y.values, last.values].concat();
    Tensor::new(&[values.len()], values)
}

fn joined_arrays((y, last): (Array, Array)) -> Result<Array> {
    Ok(concatenate(&[y.flatten(None, None)?, last.flatten(None, None)?], 0)?)
}

fn tensor(seed: u64, shape: &[i32]) -> Tensor {
    Tensor::of(&normal(seed, shape, Dtype::Float32))
}

/// Every combination of the options, with and without segments.
fn asks() -> impl Iterator<Item = Ask<'static>> {
    (0..8).map(|bits| Ask {
        axis: 1,
        exclusive: bits & 1 == 1,
        reverse: bits & 2 == 2,
        segments: (bits & 4 == 4).then_some(&SEGMENTS[..]),
    })
}

fn options<'a>(ask: Ask<'a>, state: &'a Array) -> ScanOptions<'a> {
    ScanOptions {
        axis: ask.axis as i32,
        exclusive: ask.exclusive,
        reverse: ask.reverse,
        initial_state: Some(state),
        segments: ask.segments,
        ..Default::default()
    }
}

#[test]
fn gradients_of_affine_scans_match_finite_differences() {
    for (number, ask) in asks().enumerate() {
        // Decays of their own, one for each channel, one for each step, and along two axes.
        let of_decay = [[2, 7, 3], [1, 1, 3], [1, 7, 1], [2, 7, 1]][number % 4];
        let states = if ask.segments.is_some() { &[2, 3, 3][..] } else { &[2, 3] };
        let a = Tensor::of(&decays(1, &of_decay, Dtype::Float32));
        let inputs = [a, tensor(2, &[2, 7, 3]), tensor(3, states)];
        gradients_on_each_backend(
            "affine_scan",
            &inputs,
            |inputs| joined(oracle::affine(&inputs[0], &inputs[1], Some(&inputs[2]), ask)),
            |arrays, dispatch| {
                let options = ScanOptions { dispatch, ..options(ask, &arrays[2]) };
                joined_arrays(affine_scan_with_state(&arrays[0], &arrays[1], options)?)
            },
        );
    }
}

/// The axis last, and long enough for chunks.
#[test]
fn gradients_along_rows_match_finite_differences() {
    for (exclusive, reverse) in [(false, false), (true, true)] {
        let ask = Ask { exclusive, reverse, ..Ask::along(1) };
        let a = Tensor::of(&decays(1, &[2, 41], Dtype::Float32));
        let inputs = [a, tensor(2, &[2, 41]), tensor(3, &[2])];
        gradients_on_each_backend(
            "affine_scan",
            &inputs,
            |inputs| joined(oracle::affine(&inputs[0], &inputs[1], Some(&inputs[2]), ask)),
            |arrays, dispatch| {
                let options = ScanOptions { dispatch, ..options(ask, &arrays[2]) };
                joined_arrays(affine_scan_with_state(&arrays[0], &arrays[1], options)?)
            },
        );
    }
}

/// In pieces, which a kernel scans side by side.
#[test]
fn gradients_along_long_axes_match_finite_differences() {
    let numbers = [0, 520, 520, 1030];
    for (channels, exclusive, reverse, segmented) in
        [(1, false, false, false), (2, true, true, false), (2, false, true, true)]
    {
        let ask = Ask { axis: 1, exclusive, reverse, segments: segmented.then_some(&numbers) };
        let state = if segmented { &[1, 3, channels][..] } else { &[1, channels] };
        let a = Tensor::of(&decays(1, &[1, 1030, 1], Dtype::Float32));
        let inputs = [a, tensor(2, &[1, 1030, channels]), tensor(3, state)];
        gradients_on_each_backend(
            "affine_scan",
            &inputs,
            |inputs| joined(oracle::affine(&inputs[0], &inputs[1], Some(&inputs[2]), ask)),
            |arrays, dispatch| {
                let options = ScanOptions { dispatch, ..options(ask, &arrays[2]) };
                joined_arrays(affine_scan_with_state(&arrays[0], &arrays[1], options)?)
            },
        );
    }
}

/// Of decay and input, `[1, L, 1]`, what `flow` comes to, with the recurrence taken back by hand.
fn gradient(decay: &Tensor, x: &Tensor, flow: &Tensor) -> Tensor {
    let [h, _] = oracle::affine(decay, x, None, Ask::along(1));
    let length = x.values.len();
    let (mut of_decay, mut of_x, mut later) = (vec![0.0; length], vec![0.0; length], 0.0);
    for t in (0..length).rev() {
        of_x[t] = flow.values[t] + later;
        of_decay[t] = if t > 0 { of_x[t] * h.values[t - 1] } else { 0.0 };
        later = decay.values[t] * of_x[t];
    }
    Tensor::new(&[2 * length], [of_decay, of_x].concat())
}

#[test]
fn gradients_of_gradients_match_finite_differences() {
    let decay = Tensor::of(&decays(1, &[1, 9, 1], Dtype::Float32));
    let inputs = [decay, tensor(2, &[1, 9, 1]), tensor(3, &[1, 9, 1])];
    gradients_on_each_backend(
        "affine_scan",
        &inputs,
        |inputs| gradient(&inputs[0], &inputs[1], &inputs[2]),
        |arrays, dispatch| {
            let options = ScanOptions { axis: 1, dispatch, ..Default::default() };
            // MLX would hand on a refusal as an error of its own.
            affine_scan(&arrays[0], &arrays[1], options)?;
            let scan = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
                Ok(vec![affine_scan(&inputs[0], &inputs[1], options)?])
            };
            let (_, gradients) = fallible_vjp(scan, &arrays[..2], &arrays[2..])?;
            Ok(concatenate(&gradients, 0)?.flatten(None, None)?)
        },
    );
}

/// Channels and rows have nothing to do with each other, however many there are.
#[test]
fn gradients_of_many_channels_are_those_of_few() {
    let shape = [128, 7, 128];
    let inputs = [1, 2, 3].map(|seed| decays(seed, &shape, Dtype::Float32));
    let gradients = |inputs: &[Array], dispatch| -> Result<Array> {
        let options = ScanOptions { axis: 1, dispatch, ..Default::default() };
        affine_scan(&inputs[0], &inputs[1], options)?;
        let scan = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            Ok(vec![affine_scan(&inputs[0], &inputs[1], options)?])
        };
        Ok(concatenate(&fallible_vjp(scan, &inputs[..2], &inputs[2..])?.1, 1)?)
    };
    let few = |array: &Array| array.try_index((120.., .., 60..)).unwrap();
    let expected =
        gradients(&inputs.each_ref().map(few), Dispatch::Only(Backend::Reference)).unwrap();
    on_each_backend(
        "affine_scan",
        |dispatch| gradients(&inputs, dispatch),
        |backend, all| {
            let what = format!("gradients of many channels on {backend}");
            let tolerance = Tolerance::of("affine_scan", Dtype::Float32);
            assert_close(&what, &few(&all), &Tensor::of(&expected), tolerance);
        },
    );
}

#[test]
fn gradients_of_every_operator_match_finite_differences() {
    let operators = [
        ScanOperator::Add,
        ScanOperator::Mul,
        ScanOperator::Max,
        ScanOperator::Min,
        ScanOperator::LogAddExp,
    ];
    for operator in operators {
        for ask in asks() {
            let states = if ask.segments.is_some() { &[2, 3, 3][..] } else { &[2, 3] };
            // The others have the gradient of the reference.
            gradients_on_backends(
                with_kernels(operator == ScanOperator::Add),
                "associative_scan",
                &[tensor(2, &[2, 7, 3]), tensor(3, states)],
                |inputs| joined(oracle::associative(operator, &inputs[0], Some(&inputs[1]), ask)),
                |arrays, dispatch| {
                    let options = ScanOptions { dispatch, ..options(ask, &arrays[1]) };
                    joined_arrays(associative_scan_with_state(&arrays[0], operator, options)?)
                },
            );
        }
    }
}

/// A product that holds a zero, which no quotient of products survives.
#[test]
fn gradients_of_products_with_zeros_match_finite_differences() {
    let mut x = tensor(2, &[1, 6, 1]);
    x.values[2] = 0.0;
    x.values[4] = 0.0;
    let ask = Ask::along(1);
    gradients_on_each_backend(
        "associative_scan",
        &[x],
        |inputs| joined(oracle::associative(ScanOperator::Mul, &inputs[0], None, ask)),
        |arrays, dispatch| {
            let options = ScanOptions { axis: 1, dispatch, ..Default::default() };
            joined_arrays(associative_scan_with_state(&arrays[0], ScanOperator::Mul, options)?)
        },
    );
}
