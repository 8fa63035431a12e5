use mlx_primitives::scan::{
    CausalConv1d, CausalConv1dBuilder, CausalConvOptions, causal_conv1d, causal_conv1d_with_state,
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::Module,
    ops::{concatenate, indexing::IndexOp},
};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    modules::assert_module,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "causal_conv1d";

/// `state` is `[S, W - 1, D]`, one for each of the `(row, begin, end)` of `sequences`.
fn oracle(
    [x, weight, bias, state]: [&Tensor; 4],
    silu: bool,
    sequences: &[(usize, usize, usize)],
) -> (Tensor, Tensor) {
    let width = weight.shape[1];
    let mut y = x.clone();
    let mut last = state.clone();
    for (which, &(row, begin, end)) in sequences.iter().enumerate() {
        for d in 0..x.shape[2] {
            // The input `ago` steps before the one at `t`, in this sequence or before it.
            let input = |t: usize, ago: usize| match t >= begin + ago {
                true => x.at(&[row, t - ago, d]),
                false => state.at(&[which, width - 1 + t - begin - ago, d]),
            };
            for t in begin..end {
                let taps = (0..width).map(|k| weight.at(&[d, k]) * input(t, width - 1 - k));
                let sum = taps.sum::<f64>() + bias.at(&[d]);
                let at = (row * x.shape[1] + t) * x.shape[2] + d;
                y.values[at] = if silu { sum / (1.0 + (-sum).exp()) } else { sum };
            }
            for k in 0..width - 1 {
                let at = (which * (width - 1) + k) * x.shape[2] + d;
                last.values[at] = input(end, width - 1 - k);
            }
        }
    }
    (y, last)
}

#[test]
fn outputs_and_states_match_the_oracle() {
    for (width, silu, segments) in [
        (1, false, None),
        (2, true, None),
        (4, true, None),
        (7, false, None),
        (3, true, Some(&[0, 0, 1, 5, 6][..])),
    ] {
        for dtype in FLOATING {
            let batch = if segments.is_some() { 1 } else { 2 };
            let sequences: Vec<_> = match segments {
                None => (0..2).map(|row| (row, 0, 6)).collect(),
                Some(cuts) => {
                    cuts.windows(2).map(|pair| (0, pair[0] as usize, pair[1] as usize)).collect()
                }
            };
            let x = strided(&normal(1, &[batch, 6, 3], dtype));
            let weight = normal(2, &[3, width], Dtype::Float32);
            let bias = normal(3, &[3], dtype);
            let state = normal(4, &[sequences.len() as i32, width - 1, 3], dtype);
            let options = CausalConvOptions {
                bias: Some(&bias),
                silu,
                initial_state: Some(&state),
                segments,
            };
            let (y, last) = causal_conv1d_with_state(&x, &weight, options).unwrap();
            let tensors = [&x, &weight, &bias, &state].map(Tensor::of);
            let (expected, expected_last) = oracle(tensors.each_ref(), silu, &sequences);
            let what = format!("{OP} of {width} {dtype:?}");
            assert_eq!(y.dtype(), dtype);
            assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
            assert_close(&format!("{what}: state"), &last, &expected_last, Tolerance::EXACT);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let shapes: [&[i32]; 4] = [&[2, 5, 2], &[2, 3], &[2], &[2, 2, 2]];
    let inputs: Vec<_> = (1..)
        .zip(shapes)
        .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)))
        .collect();
    assert_gradients(
        OP,
        &inputs,
        |inputs| {
            let [x, weight, bias, state] = inputs else { panic!("four inputs") };
            oracle([x, weight, bias, state], true, &[(0, 0, 5), (1, 0, 5)]).0
        },
        |arrays| {
            let options = CausalConvOptions {
                bias: Some(&arrays[2]),
                silu: true,
                initial_state: Some(&arrays[3]),
                segments: None,
            };
            causal_conv1d(&arrays[0], &arrays[1], options)
        },
    );
}

#[test]
fn a_sequence_cut_anywhere_is_the_whole_one() {
    let conv = CausalConv1dBuilder::new(3, 4).silu(true).build().unwrap();
    let x = normal(1, &[2, 9, 3], Dtype::Float32);
    let (whole, end) = conv.with_state(&x, None).unwrap();
    for cut in 0..=9 {
        let (first, state) = conv.with_state(&x.index((.., ..cut)), None).unwrap();
        let (second, state) = conv.with_state(&x.index((.., cut..)), Some(&state)).unwrap();
        let joined = concatenate(&[first, second], 1).unwrap();
        assert_close("joined", &joined, &Tensor::of(&whole), Tolerance::EXACT);
        assert_close("state", &state, &Tensor::of(&end), Tolerance::EXACT);
    }
}

#[test]
fn the_module_trains_and_loads_weights_of_either_layout() {
    let x = normal(1, &[2, 5, 3], Dtype::Float32);
    let mut conv = CausalConv1d::new(3, 4).unwrap();
    let expected = Tensor::of(&conv.forward(&x).unwrap());
    conv.weight.value = conv.weight.reshape(&[3, 4, 1]).unwrap();
    assert_close("as MLX has it", &conv.forward(&x).unwrap(), &expected, Tolerance::EXACT);
    assert_module(conv, &x, &["bias", "weight"]);
    let plain = CausalConv1dBuilder::new(3, 4).bias(false).build().unwrap();
    assert_module(plain, &x, &["weight"]);
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let float = |shape: &[i32]| normal(1, shape, Dtype::Float32);
    let (x, weight) = (float(&[1, 5, 3]), float(&[3, 4]));
    let call = |x: &Array, weight: &Array, options: CausalConvOptions| {
        causal_conv1d(x, weight, options).unwrap_err().to_string()
    };
    let none = CausalConvOptions::default();
    let wrong = float(&[1, 2, 3]);
    for (error, message) in [
        (call(&weight, &weight, none), "x must have shape [B, L, D] but got [3, 4]"),
        (call(&x, &float(&[2, 4]), none), "weight must have shape [3, W] but got [2, 4]"),
        (call(&x, &float(&[3, 0]), none), "weight must have shape [..., D] with D at least 1"),
        (
            call(&x, &weight, CausalConvOptions { bias: Some(&wrong), ..none }),
            "bias must have shape [3] but got [1, 2, 3]",
        ),
        (
            call(&x, &weight, CausalConvOptions { initial_state: Some(&wrong), ..none }),
            "initial_state must have shape [1, 3, 3] but got [1, 2, 3]",
        ),
        (
            call(&x, &weight, CausalConvOptions { segments: Some(&[0, 4]), ..none }),
            "segments must end at L = 5 but got 4",
        ),
    ] {
        assert!(error.starts_with(&format!("[causal_conv1d] {message}")), "{error}");
    }
    assert!(CausalConv1d::new(0, 4).is_err());
    assert!(CausalConv1d::new(3, 0).is_err());
}
