use mlx_primitives::{
    Backend, Dispatch, Layout, Result,
    rope::{QkNormRopeOptions, RopeOptions, RopeStyle, qk_norm_rope},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::concatenate,
    transforms::{compile::compile, fallible_vjp},
};

use super::{
    oracle::Oracle,
    pair::{CASES, Case, LAYOUTS, STYLES, in_one, tensors_in_one},
};
use crate::support::{
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "qk_norm_rope";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

/// Small enough that what is turned is no larger than what the tests of `rope` turn.
fn weight(seed: u64, size: i32, dtype: Dtype) -> Array {
    let small = normal(seed, &[size], Dtype::Float32).multiply(Array::from_f32(0.3)).unwrap();
    small.as_dtype(dtype).unwrap()
}

fn norm(x: &Tensor, weight: &Tensor, unit_offset: bool) -> Tensor {
    let offset = if unit_offset { 1.0 } else { 0.0 };
    let normed = x.rows().flat_map(|row| {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        row.iter().zip(&weight.values).map(move |(v, w)| v * scale * (offset + w))
    });
    Tensor::new(&x.shape, normed.collect())
}

fn options(rope: RopeOptions) -> QkNormRopeOptions {
    QkNormRopeOptions { eps: EPS, rope, ..Default::default() }
}

fn assert(case: &Case, style: RopeStyle, layout: Layout, dtype: Dtype, of_weights: [Dtype; 2]) {
    let [queries, keys] = case.arrays(layout, dtype);
    let weights = [(3, of_weights[0]), (4, of_weights[1])];
    let [query_weight, key_weight] = weights.map(|(seed, dtype)| weight(seed, case.size(), dtype));
    let oracle = case.oracle(style, layout);
    let normed = [(&queries, &query_weight), (&keys, &key_weight)]
        .map(|(x, weight)| norm(&Tensor::of(x), &Tensor::of(weight), false));
    let expected = tensors_in_one(normed.each_ref().map(|x| oracle.rotate(x)));
    case.with_offset(|offset| {
        on_each_backend(
            OP,
            |dispatch| {
                let dims = case.dims;
                let rope = RopeOptions { dims, style, layout, dispatch, ..Default::default() };
                let (queries, keys) = ((&queries, &query_weight), (&keys, &key_weight));
                in_one(qk_norm_rope(queries, keys, offset, options(rope))?)
            },
            |backend, y| {
                let what = format!(
                    "{OP} {} {style:?} {layout:?} {dtype:?} with {of_weights:?} on {backend}",
                    case.name
                );
                assert_eq!(y.dtype(), dtype, "{what}");
                assert_close(&what, &y, &expected, oracle.tolerance(backend, &normed[0], dtype));
            },
        );
    });
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        case.each(|style, layout, dtype| assert(case, style, layout, dtype, [dtype; 2]));
    }
}

#[test]
fn weights_of_other_dtypes_keep_that_of_queries_and_keys() {
    let case = CASES.iter().find(|case| case.name == "part of a head").unwrap();
    for (dtype, of_weights) in [
        (Dtype::Float16, [Dtype::Float32, Dtype::Bfloat16]),
        (Dtype::Float32, [Dtype::Float16, Dtype::Float32]),
    ] {
        assert(case, RopeStyle::HalfSplit, Layout::Bshd, dtype, of_weights);
    }
}

#[test]
fn a_unit_offset_is_added_to_the_weight() {
    let x = normal(1, &[2, 3, 2, 64], Dtype::Float32);
    let weight = weight(3, 64, Dtype::Float32);
    let oracle = Oracle::new(RopeStyle::HalfSplit, 64, 2, 7);
    let normed = norm(&Tensor::of(&x), &Tensor::of(&weight), true);
    let expected = tensors_in_one([oracle.rotate(&normed), oracle.rotate(&normed)]);
    on_each_backend(
        OP,
        |dispatch| {
            let rope = RopeOptions { dispatch, ..Default::default() };
            let options = QkNormRopeOptions { unit_offset: true, ..options(rope) };
            in_one(qk_norm_rope((&x, &weight), (&x, &weight), 7, options)?)
        },
        |backend, y| {
            let tolerance = oracle.tolerance(backend, &normed, Dtype::Float32);
            assert_close(&format!("{OP} with 1 + weight on {backend}"), &y, &expected, tolerance);
        },
    );
}

#[test]
fn gradients_match_finite_differences() {
    for ((style, layout), unit_offset) in STYLES.into_iter().zip(LAYOUTS).zip([false, true]) {
        let oracle = Oracle { layout, ..Oracle::new(style, 4, 2, 3) };
        let keys = match layout {
            Layout::Bshd => [2, 3, 1, 6],
            Layout::Bhsd => [2, 1, 3, 6],
        };
        let inputs = [
            normal(3, &[2, 3, 3, 6], Dtype::Float32),
            normal(4, &keys, Dtype::Float32),
            normal(5, &[6], Dtype::Float32),
            normal(6, &[6], Dtype::Float32),
        ];
        gradients_on_each_backend(
            OP,
            &inputs.map(|array| Tensor::of(&array)),
            |inputs| {
                let normed =
                    [(0, 2), (1, 3)].map(|(x, w)| norm(&inputs[x], &inputs[w], unit_offset));
                tensors_in_one(normed.map(|x| oracle.rotate(&x)))
            },
            |arrays, dispatch| {
                let rope =
                    RopeOptions { dims: Some(4), style, layout, dispatch, ..Default::default() };
                let options = QkNormRopeOptions { unit_offset, ..options(rope) };
                let (queries, keys) = ((&arrays[0], &arrays[2]), (&arrays[1], &arrays[3]));
                in_one(qk_norm_rope(queries, keys, 3, options)?)
            },
        );
    }
}

/// Enough of them that each threadgroup works on several, and too many for finite differences.
#[test]
fn gradients_of_many_tokens_are_those_of_the_reference() {
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let arrays = [
            normal(3, &[2, 71, 5, 64], dtype),
            normal(4, &[2, 71, 1, 64], dtype),
            weight(5, 64, dtype),
            weight(6, 64, dtype),
        ];
        let cotangents = [normal(7, &[2, 71, 5, 64], dtype), normal(8, &[2, 71, 1, 64], dtype)];
        let forward = |arrays: &[Array], dispatch| {
            let rope = RopeOptions { dispatch, ..Default::default() };
            let (queries, keys) = ((&arrays[0], &arrays[2]), (&arrays[1], &arrays[3]));
            qk_norm_rope(queries, keys, 9, options(rope))
        };
        let gradients = |dispatch| -> Result<Array> {
            // Here, because the transform would hide that a backend is unavailable.
            forward(&arrays, dispatch)?;
            let outputs = |arrays: &[Array]| -> Result<Vec<Array>, Exception> {
                let (queries, keys) = forward(arrays, dispatch)?;
                Ok(vec![queries, keys])
            };
            let (_, gradients) = fallible_vjp(outputs, &arrays, &cotangents)?;
            let rows = gradients.iter().map(|gradient| gradient.reshape(&[-1]));
            Ok(concatenate(&rows.collect::<Result<Vec<_>, _>>()?, 0)?)
        };
        let expected = Tensor::of(&gradients(Dispatch::Only(Backend::Reference)).unwrap());
        on_each_backend(OP, gradients, |backend, got| {
            // MLX turns by other angles, and rounds in between.
            if backend != Backend::Builtin {
                assert_close(&format!("{OP} {dtype:?} on {backend}"), &got, &expected, sums(dtype));
            }
        });
    }
}

/// Of weights' gradients, which are sums over 710 heads; in bf16 both round f32 sums once.
fn sums(dtype: Dtype) -> Tolerance {
    match dtype {
        Dtype::Float32 => Tolerance { rtol: 1e-4, atol: 1e-4 },
        _ => Tolerance::of(OP, dtype),
    }
}

#[test]
fn it_compiles() {
    let turn = |arrays: &[Array]| -> Result<Vec<Array>, Exception> {
        let (queries, keys) = ((&arrays[0], &arrays[2]), (&arrays[1], &arrays[2]));
        let (queries, keys) = qk_norm_rope(queries, keys, 5, QkNormRopeOptions::default())?;
        Ok(vec![queries, keys])
    };
    let arrays = [
        normal(1, &[2, 3, 4, 64], Dtype::Float32),
        normal(2, &[2, 3, 2, 64], Dtype::Float32),
        weight(3, 64, Dtype::Float32),
    ];
    let expected = turn(&arrays).unwrap();
    let got = compile(turn, None)(&arrays).unwrap();
    for (got, expected) in got.iter().zip(&expected) {
        let tolerance = Tolerance::of(OP, Dtype::Float32);
        assert_close("compiled qk_norm_rope", got, &Tensor::of(expected), tolerance);
    }
}

#[test]
fn heads_too_large_for_the_kernel_are_refused() {
    crate::support::host::install();
    let (x, weight) =
        (normal(1, &[1, 1, 1, 1026], Dtype::Float32), weight(3, 1026, Dtype::Float32));
    let rope = RopeOptions { dispatch: Dispatch::Only(Backend::Kernel), ..Default::default() };
    let refusal = qk_norm_rope((&x, &weight), (&x, &weight), 0, options(rope)).unwrap_err();
    assert!(refusal.to_string().starts_with("[qk_norm_rope] backend kernel is unavailable: "));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 3, 4, 8], Dtype::Float32);
    let of = |size| weight(3, size, Dtype::Float32);
    let refusal = |query_weight: &Array, key_weight: &Array, eps| {
        let options = QkNormRopeOptions { eps, ..Default::default() };
        qk_norm_rope((&x, query_weight), (&x, key_weight), 0, options).unwrap_err().to_string()
    };
    assert_eq!(
        refusal(&of(9), &of(8), EPS),
        "[qk_norm_rope] query weight must have shape [8] but got [9]"
    );
    assert_eq!(
        refusal(&of(8), &of(1), EPS),
        "[qk_norm_rope] key weight must have shape [8] but got [1]"
    );
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    assert!(refusal(&of(8), &ints, EPS).starts_with("[qk_norm_rope] key weight must have dtype"));
    assert_eq!(
        refusal(&of(8), &of(8), -1.0),
        "[qk_norm_rope] eps must be finite and at least 0 but got -1"
    );
}
