use std::f64::consts::FRAC_PI_2;

use mlx_primitives::attention::*;
use mlx_rs::{Array, Dtype};

use super::{
    linear_oracle::{Rule, average},
    linear_support::{check_all, check_pieces, check_refusals, inputs, refusal, tensors, zeros},
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    tensor::Tensor,
};

const OP: &str = "cosformer_attention";

type Options<'a> = CosFormerAttentionOptions<'a>;

fn expected(inputs: [&Tensor; 3], length: Option<i32>, causal: bool) -> Tensor {
    let longest = inputs[0].shape[1].max(inputs[1].shape[1]).max(1);
    let length = length.map_or(longest as f64, f64::from);
    average(inputs, Rule { causal, eps: 1e-6 }, |query, key, i, j| {
        let near = (FRAC_PI_2 * (i - j) as f64 / length).cos();
        near * query.iter().zip(key).map(|(q, k)| q.max(0.0) * k.max(0.0)).sum::<f64>()
    })
}

#[test]
fn it_matches_the_oracle() {
    for (max_length, chunk_size) in [(None, 4), (None, 128), (Some(100), 16)] {
        check_all(
            OP,
            |inputs, causal| expected(inputs, max_length, causal),
            |inputs, layout, causal| {
                let options =
                    Options { causal, max_length, chunk_size, layout, ..Default::default() };
                cosformer_attention(&inputs[0], &inputs[1], &inputs[2], options)
            },
        );
    }
}

#[test]
fn both_agree_at_the_last_position() {
    let inputs = inputs([1, 2, 2, 9, 9, 8, 8], Dtype::Float32);
    let last = |causal| {
        let options = Options { causal, ..Default::default() };
        let y = cosformer_attention(&inputs[0], &inputs[1], &inputs[2], options).unwrap();
        y.take_axis(Array::from_slice(&[8], &[1]), 1).unwrap()
    };
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("last position", &last(true), &Tensor::of(&last(false)), tolerance);
}

#[test]
fn gradients_match_finite_differences() {
    for (shape, causal) in [([2, 2, 1, 4, 4, 6, 2], false), ([1, 2, 2, 5, 4, 6, 2], true)] {
        // Away from zero, where the map has no slope.
        let mut tensors = tensors(&inputs(shape, Dtype::Float32));
        for tensor in &mut tensors[..2] {
            tensor.values.iter_mut().for_each(|x| *x += x.signum() * 0.1);
            tensor.values.iter_mut().step_by(3).for_each(|x| *x = x.abs());
        }
        assert_gradients(
            OP,
            &tensors,
            |inputs| expected([&inputs[0], &inputs[1], &inputs[2]], Some(8), causal),
            |inputs| {
                let options =
                    Options { causal, max_length: Some(8), chunk_size: 2, ..Default::default() };
                cosformer_attention(&inputs[0], &inputs[1], &inputs[2], options)
            },
        );
    }
}

#[test]
fn pieces_are_the_whole() {
    let options = Options { causal: true, max_length: Some(20), ..Default::default() };
    for pieces in [&[5, 1, 1, 1][..], &[3, 4, 0, 2], &[1, 1, 1]] {
        check_pieces(
            OP,
            pieces,
            |[q, k, v]| cosformer_attention(q, k, v, options).unwrap(),
            |[q, k, v], state, offset| {
                let options = Options { state, offset, ..options };
                cosformer_attention_with_state(q, k, v, options).unwrap()
            },
        );
    }
}

#[test]
fn bad_arguments_are_named() {
    check_refusals(OP, |[q, k, v]| cosformer_attention(q, k, v, Options::default()));
    let (q, k) = (zeros(&[2, 9, 4, 8]), zeros(&[2, 7, 4, 8]));
    let with = |options: Options| refusal(cosformer_attention(&q, &k, &k, options));
    let none = Options::default;
    let too_short = "max_length must be from 9 to 16777216 but got";
    for length in [8, 0, -1, i32::MAX] {
        assert_eq!(
            with(Options { max_length: Some(length), ..none() }),
            format!("[{OP}] {too_short} {length}")
        );
    }
    assert_eq!(
        with(Options { max_length: Some(9), offset: 3, ..none() }),
        format!("[{OP}] max_length must be from 10 to 16777216 but got 9")
    );
    for offset in [-1, i32::MAX] {
        assert_eq!(
            with(Options { offset, ..none() }),
            format!("[{OP}] offset must be from 0 to 16777216 but got {offset}")
        );
    }
    assert_eq!(
        with(Options { eps: -1.0, ..none() }),
        format!("[{OP}] eps must be finite and at least 0 but got -1")
    );
    assert_eq!(
        with(Options { chunk_size: 0, ..none() }),
        format!("[{OP}] chunk_size must be at least 1 but got 0")
    );
    let (_, state) = cosformer_attention_with_state(&q, &k, &k, none()).unwrap();
    assert_eq!(state.sums.shape(), [2, 4, 16, 8]);
    assert_eq!(
        with(Options { state: Some(&state), ..none() }),
        format!("[{OP}] max_length must be given with a state but got none")
    );
    let other = LinearAttentionState { sums: zeros(&[2, 4, 8, 8]), ..state };
    assert_eq!(
        with(Options { state: Some(&other), max_length: Some(20), ..none() }),
        format!("[{OP}] state.sums must have shape [2, 4, 16, 8] but got [2, 4, 8, 8]")
    );
}
