use mlx_primitives::{
    Backend, Dispatch, Error, Layout, Result,
    rope::{RopeFrequencies, RopeOptions, RopeStyle, rope_qk},
};
use mlx_rs::{Array, Dtype, error::Exception, transforms::compile::compile};

use super::{
    oracle::Oracle,
    pair::{CASES, Case, LAYOUTS, STYLES, in_one, tensors_in_one},
};
use crate::support::{
    FLOATING, backends::on_each_backend, compare::assert_close,
    gradient::gradients_on_each_backend, sample::normal, tensor::Tensor,
};

const OP: &str = "rope_qk";

fn assert(case: &Case, style: RopeStyle, layout: Layout, dtype: Dtype) {
    let [queries, keys] = case.arrays(layout, dtype);
    let oracle = case.oracle(style, layout);
    let values = [Tensor::of(&queries), Tensor::of(&keys)];
    let expected = tensors_in_one(values.each_ref().map(|x| oracle.rotate(x)));
    case.with_offset(|offset| {
        on_each_backend(
            OP,
            |dispatch| {
                let dims = case.dims;
                let options = RopeOptions { dims, style, layout, dispatch, ..Default::default() };
                in_one(rope_qk(&queries, &keys, offset, options)?)
            },
            |backend, y| {
                let what =
                    format!("{OP} {} {style:?} {layout:?} {dtype:?} on {backend}", case.name);
                assert_eq!(y.dtype(), dtype, "{what}");
                let tolerance = oracle.tolerance(backend, &values[0], dtype);
                assert_close(&what, &y, &expected, tolerance);
            },
        );
    });
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        case.each(|style, layout, dtype| assert(case, style, layout, dtype));
    }
}

#[test]
fn given_frequencies_and_magnitude_are_used() {
    let given = RopeFrequencies { inverse: vec![0.5, 0.0, -0.25], magnitude: 1.25 };
    let [queries, keys] =
        [(1, 3), (2, 1)].map(|(seed, heads)| normal(seed, &[2, 5, heads, 8], Dtype::Float32));
    for style in STYLES {
        let oracle = Oracle {
            frequencies: given.inverse.clone(),
            magnitude: given.magnitude,
            ..Oracle::new(style, 6, 2, 7)
        };
        let values = [Tensor::of(&queries), Tensor::of(&keys)];
        let expected = tensors_in_one(values.each_ref().map(|x| oracle.rotate(x)));
        on_each_backend(
            OP,
            |dispatch| {
                let (dims, frequencies) = (Some(6), Some(given.clone()));
                let options =
                    RopeOptions { dims, style, frequencies, dispatch, ..Default::default() };
                in_one(rope_qk(&queries, &keys, 7, options)?)
            },
            |backend, y| {
                let tolerance = oracle.tolerance(backend, &values[0], Dtype::Float32);
                let what = format!("{OP} by frequencies {style:?} on {backend}");
                assert_close(&what, &y, &expected, tolerance);
            },
        );
    }
}

#[test]
fn nothing_turns_into_nothing() {
    for (shape, kv_heads) in [([0, 3, 2, 8], 2), ([2, 0, 2, 8], 2), ([2, 3, 2, 8], 0)] {
        for dtype in FLOATING {
            let queries = normal(1, &shape, dtype);
            let keys = normal(2, &[shape[0], shape[1], kv_heads, shape[3]], dtype);
            on_each_backend(
                OP,
                |dispatch| {
                    let options = RopeOptions { dispatch, ..Default::default() };
                    let (_, turned) = rope_qk(&queries, &keys, 7, options)?;
                    Ok(turned)
                },
                |backend, turned| {
                    turned.eval().unwrap();
                    assert_eq!(
                        (turned.shape(), turned.dtype()),
                        (keys.shape(), dtype),
                        "{backend}"
                    );
                },
            );
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (style, layout) in STYLES.into_iter().zip(LAYOUTS) {
        let oracle = Oracle { magnitude: 1.25, layout, ..Oracle::new(style, 4, 2, 3) };
        let frequencies =
            RopeFrequencies { inverse: oracle.frequencies.clone(), magnitude: oracle.magnitude };
        // [B, S, H, D] in one layout, and [B, H, S, D] with as many steps in the other.
        let inputs = [
            normal(3, &[2, 3, 3, 6], Dtype::Float32),
            match layout {
                Layout::Bshd => normal(4, &[2, 3, 1, 6], Dtype::Float32),
                Layout::Bhsd => normal(4, &[2, 1, 3, 6], Dtype::Float32),
            },
        ];
        gradients_on_each_backend(
            OP,
            &inputs.map(|array| Tensor::of(&array)),
            |inputs| tensors_in_one([oracle.rotate(&inputs[0]), oracle.rotate(&inputs[1])]),
            |arrays, dispatch| {
                let (dims, frequencies) = (Some(4), Some(frequencies.clone()));
                let options = RopeOptions {
                    dims,
                    style,
                    frequencies,
                    layout,
                    dispatch,
                    ..Default::default()
                };
                in_one(rope_qk(&arrays[0], &arrays[1], 3, options)?)
            },
        );
    }
}

#[test]
fn it_compiles() {
    let turn = |arrays: &[Array]| -> Result<Vec<Array>, Exception> {
        let (queries, keys) = rope_qk(&arrays[0], &arrays[1], &arrays[2], RopeOptions::default())?;
        Ok(vec![queries, keys])
    };
    let [queries, keys] =
        [(1, 4), (2, 2)].map(|(seed, heads)| normal(seed, &[2, 3, heads, 64], Dtype::Float32));
    let mut compiled = compile(turn, None);
    for rows in [[0, 9], [100_000, 3]] {
        let starts = Array::from_slice(&rows, &[2]);
        let oracle = Oracle {
            starts: rows.map(i64::from).to_vec(),
            ..Oracle::new(RopeStyle::HalfSplit, 64, 2, 0)
        };
        let turned = compiled(&[queries.clone(), keys.clone(), starts]).unwrap();
        for (x, turned) in [&queries, &keys].into_iter().zip(turned) {
            let values = Tensor::of(x);
            let tolerance = oracle.tolerance(Backend::Builtin, &values, Dtype::Float32);
            assert_close("compiled rope_qk", &turned, &oracle.rotate(&values), tolerance);
        }
    }
}

fn refusal(queries: &Array, keys: &Array, options: RopeOptions) -> String {
    rope_qk(queries, keys, 0, options).unwrap_err().to_string()
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = |shape: &[i32]| normal(1, shape, Dtype::Float32);
    let queries = x(&[2, 3, 4, 8]);
    let keys_refused = |keys: &Array| refusal(&queries, keys, RopeOptions::default());
    assert_eq!(
        refusal(&x(&[2, 3, 8]), &queries, RopeOptions::default()),
        "[rope_qk] queries must have shape [B, S, H, D] but got [2, 3, 8]"
    );
    for shape in [&[2, 4, 4, 8][..], &[1, 3, 4, 8], &[2, 3, 4, 6], &[2, 3, 32]] {
        assert_eq!(
            keys_refused(&x(shape)),
            format!("[rope_qk] keys must have shape [2, 3, H_kv, 8] but got {shape:?}")
        );
    }
    assert_eq!(
        keys_refused(&normal(1, &[2, 3, 1, 8], Dtype::Float16)),
        "[rope_qk] keys must have dtype Float32 but got Float16"
    );
    let ints = Array::from_slice(&[0_i32; 8], &[1, 1, 1, 8]);
    assert!(
        refusal(&ints, &ints, RopeOptions::default()).starts_with("[rope_qk] queries must have")
    );
    let options = RopeOptions { dims: Some(10), ..Default::default() };
    assert_eq!(
        refusal(&queries, &queries, options),
        "[rope_qk] dims must be at most D = 8 but got 10"
    );
    let starts = Array::from_slice(&[0_i32; 3], &[3]);
    let error = rope_qk(&queries, &queries, &starts, RopeOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "[rope_qk] offset must have shape [2] but got [3]");
}

#[test]
fn a_forced_kernel_takes_nothing_empty() {
    crate::support::host::install();
    let dispatch = Dispatch::Only(Backend::Kernel);
    let none = normal(1, &[0, 3, 2, 8], Dtype::Float32);
    let options = RopeOptions { dispatch, ..Default::default() };
    assert!(matches!(rope_qk(&none, &none, 0, options), Err(Error::Unavailable { .. })));
}
