//! Sequences so long that a CPU takes them in blocks.

use mlx_primitives::{
    Backend, Dispatch,
    attention::{FlashAttentionOptions as Options, flash_attention, flash_attention_with_lse},
};
use mlx_rs::{Array, Dtype, error::Exception, transforms::fallible_vjp};

use super::{
    asked::{Asked, segments},
    cases::{Case, SlopesOf, additive, case},
};
use crate::support::{
    compare::{Tolerance, assert_close},
    sample::{Random, normal},
    tensor::Tensor,
};

/// More than 2^22 scores, and no multiple of a block.
const CAUSAL: Case = Case { causal: true, ..case("causal", [1, 4, 2, 1101, 1099, 4, 6]) };
const BOUNDS: [&[i32]; 2] = [&[0, 200, 200, 903, 1101], &[0, 10, 400, 1050, 1099]];

fn every_ninth(index: &[usize]) -> bool {
    index.iter().sum::<usize>() % 9 == 0 || index[0] == 700
}

const EVERYTHING: Case = Case {
    name: "everything",
    left: Some(300),
    soft_cap: Some(2.0),
    slopes: Some(SlopesOf::BatchAndHeads),
    mask: Some(additive(&[1101, 1099], f32::NEG_INFINITY, every_ninth)),
    sinks: Some(0.5),
    ..CAUSAL
};

const CASES: &[(Case, Dtype)] = &[
    (Case { causal: true, ..case("more keys", [1, 4, 4, 700, 1700, 4, 4]) }, Dtype::Bfloat16),
    (
        Case {
            left: Some(40),
            right: Some(3),
            ..case("window of queries before keys", [2, 2, 1, 1700, 700, 4, 4])
        },
        Dtype::Float32,
    ),
    (Case { name: "segments", segments: Some(BOUNDS), sinks: Some(0.0), ..CAUSAL }, Dtype::Float32),
    (EVERYTHING, Dtype::Float32),
];

fn check(case: &Case, dtype: Dtype) {
    let (asked, segments) = (Asked::new(case, dtype), segments(case));
    let (expected, sums) = asked.tensors().expected(case, None);
    let [queries, keys, values] = &asked.inputs;
    let options = asked.options(case, &segments);
    let (y, lse) = flash_attention_with_lse(queries, keys, values, options).unwrap();
    let what = format!("{} {dtype:?}", case.name);
    assert_close(&what, &y, &expected, Tolerance::of("reference", dtype));
    assert_close(&what, &lse, &sums, Tolerance::of("reference", Dtype::Float32));
}

#[test]
fn blocks_match_the_oracle() {
    for (case, dtype) in CASES {
        check(case, *dtype);
    }
}

/// The slope along one direction through all arrays at once.
#[test]
fn the_gradient_of_blocks_matches_finite_differences() {
    const STEP: f64 = 1e-5;
    let (asked, mut random) = (Asked::new(&EVERYTHING, Dtype::Float32), Random::new(5));
    let (tensors, list) = (asked.tensors(), asked.list());
    let mut like = |tensor: &Tensor| Tensor::from_fn(&tensor.shape, |_| random.normal());
    let directions: Vec<_> = tensors.list().iter().map(&mut like).collect();
    let (y, sums) = tensors.expected(&EVERYTHING, None);
    let weights = [like(&y), like(&sums)];
    let loss = |step: f64| {
        let mut moved = tensors.list();
        for (tensor, direction) in moved.iter_mut().zip(&directions) {
            tensor.values.iter_mut().zip(&direction.values).for_each(|(x, d)| *x += step * d);
        }
        let (y, sums) = tensors.with(&moved).expected(&EVERYTHING, None);
        dot(&y, &weights[0]) + dot(&sums, &weights[1])
    };
    let expected = (loss(STEP) - loss(-STEP)) / (2.0 * STEP);

    let attend = |list: &[Array]| {
        let asked = asked.with(list);
        let [queries, keys, values] = &asked.inputs;
        let options = asked.options(&EVERYTHING, &None);
        let (y, lse) = flash_attention_with_lse(queries, keys, values, options)?;
        Ok::<_, Exception>(vec![y, lse])
    };
    let cotangents = weights.map(|weights| weights.to_array(Dtype::Float32));
    let (_, gradients) = fallible_vjp(attend, &list, &cotangents).unwrap();
    let slopes = gradients.iter().map(Tensor::of).zip(&directions);
    let got: f64 = slopes.map(|(gradient, direction)| dot(&gradient, direction)).sum();
    let scale: f64 =
        gradients.iter().map(|gradient| dot(&Tensor::of(gradient), &Tensor::of(gradient))).sum();
    assert!((got - expected).abs() < 1e-4 * scale.sqrt(), "{got} for {expected} of {scale}");
}

/// Sums over so many keys that finite differences of each would take hours: those of MLX's own op.
#[test]
fn the_gradient_of_blocks_is_that_of_one() {
    let asked = Asked::new(&CAUSAL, Dtype::Float32);
    let gradients = |dispatch| {
        let attend = |x: &[Array]| {
            let options = Options { dispatch, ..asked.options(&CAUSAL, &None) };
            Ok::<_, Exception>(vec![flash_attention(&x[0], &x[1], &x[2], options)?])
        };
        let cotangent = normal(9, &[1, 1101, 4, 6], Dtype::Float32);
        fallible_vjp(attend, &asked.inputs, &[cotangent]).unwrap().1
    };
    let expected = gradients(Dispatch::Only(Backend::Builtin));
    for (got, expected) in gradients(Dispatch::Auto).iter().zip(&expected) {
        assert_close("blocks", got, &Tensor::of(expected), Tolerance::GRADIENT);
    }
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    a.values.iter().zip(&b.values).map(|(x, y)| x * y).sum()
}
