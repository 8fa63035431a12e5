use mlx_primitives::sampling::{log_probabilities, token_log_probabilities};
use mlx_rs::{Array, Dtype};

use super::softmax;
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "log_probabilities";

fn oracle(logits: &Tensor) -> Tensor {
    let values = logits.rows().flat_map(|row| softmax(row).into_iter().map(f64::ln));
    Tensor::new(&logits.shape, values.collect())
}

/// The entry of each row of `values` that `tokens` names.
fn chosen(values: &Tensor, tokens: &[usize]) -> Tensor {
    let (_, leading) = values.shape.split_last().unwrap();
    let entries = values.rows().zip(tokens).map(|(row, &token)| row[token]);
    Tensor::new(leading, entries.collect())
}

#[test]
fn they_match_the_oracle_in_f32() {
    for dtype in FLOATING {
        for shape in [&[7][..], &[3, 1], &[2, 3, 65], &[0, 5]] {
            let logits = normal(1, shape, dtype);
            let got = log_probabilities(&logits).unwrap();
            assert_eq!(got.dtype(), Dtype::Float32);
            let expected = oracle(&Tensor::of(&logits));
            let what = format!("{OP} {shape:?} {dtype:?}");
            assert_close(&what, &got, &expected, Tolerance::of(OP, Dtype::Float32));
        }
    }
}

#[test]
fn those_of_tokens_are_among_them() {
    let logits = normal(1, &[2, 2, 65], Dtype::Float32);
    let tokens = [64, 0, 7, 7];
    let expected = chosen(&oracle(&Tensor::of(&logits)), &tokens);
    let array = Array::from_slice(&tokens.map(|token| token as u32), &[2, 2]);
    for dtype in [Dtype::Uint32, Dtype::Int32, Dtype::Uint8] {
        let got = token_log_probabilities(&logits, array.as_dtype(dtype).unwrap()).unwrap();
        assert_close("of tokens", &got, &expected, Tolerance::of(OP, Dtype::Float32));
    }
    let one = token_log_probabilities(normal(1, &[5], Dtype::Float16), Array::from_int(2)).unwrap();
    assert_eq!((one.shape(), one.dtype()), (&[][..], Dtype::Float32));
    let none = token_log_probabilities(
        normal(1, &[0, 5], Dtype::Float32),
        Array::zeros::<u32>(&[0]).unwrap(),
    );
    assert_eq!(none.unwrap().shape(), [0]);
}

#[test]
fn a_row_of_nothing_is_impossible_and_a_broken_one_shows() {
    let none = f32::NEG_INFINITY;
    let rows = [[none; 3], [f32::NAN, 0.0, 0.0], [none, 0.0, 0.0]];
    let logits = Array::from_slice(rows.as_flattened(), &[3, 3]);
    let got = Tensor::of(&log_probabilities(&logits).unwrap());
    assert_eq!(got.values[..3], [f64::NEG_INFINITY; 3]);
    assert!(got.values[3..6].iter().all(|v| v.is_nan()));
    assert_eq!(got.values[6], f64::NEG_INFINITY);
    let of_tokens = token_log_probabilities(&logits, Array::from_slice(&[0, 1, 1], &[3]));
    let of_tokens = Tensor::of(&of_tokens.unwrap()).values;
    assert_eq!(of_tokens[0], f64::NEG_INFINITY);
    assert!(of_tokens[1].is_nan());
    assert!((of_tokens[2] - 0.5_f64.ln()).abs() < 1e-6);
}

#[test]
fn a_token_that_does_not_exist_shows() {
    let tokens = Array::from_slice(&[-1, 5, i32::MAX, 4], &[4]);
    let got = token_log_probabilities(normal(1, &[4, 5], Dtype::Float32), tokens).unwrap();
    let is_nan: Vec<_> = Tensor::of(&got).values.iter().map(|v| v.is_nan()).collect();
    assert_eq!(is_nan, [true, true, true, false]);
}

#[test]
fn gradients_match_finite_differences() {
    let logits = Tensor::of(&normal(1, &[3, 6], Dtype::Float32));
    let tokens = Array::from_slice(&[5_u32, 0, 2], &[3]);
    assert_gradients(
        OP,
        std::slice::from_ref(&logits),
        |x| oracle(&x[0]),
        |x| log_probabilities(&x[0]),
    );
    assert_gradients(
        "token_log_probabilities",
        &[logits],
        |x| chosen(&oracle(&x[0]), &[5, 0, 2]),
        |x| token_log_probabilities(&x[0], &tokens),
    );
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[3, 5], Dtype::Float32);
    let ints = Array::zeros::<i32>(&[3]).unwrap();
    let empty = Array::zeros::<f32>(&[3, 0]).unwrap();
    let all = |x: &Array| log_probabilities(x).unwrap_err().to_string();
    assert!(all(&ints).contains("[log_probabilities] logits must have dtype"));
    assert!(all(&empty).contains("[log_probabilities] logits must have shape"));
    let one =
        |x: &Array, tokens: &Array| token_log_probabilities(x, tokens).unwrap_err().to_string();
    assert!(one(&ints, &ints).contains("logits must have dtype"));
    assert!(one(&empty, &ints).contains("logits must have shape"));
    assert!(one(&x, &empty).contains("tokens must have dtype"));
    let four = Array::zeros::<i32>(&[4]).unwrap();
    assert!(one(&x, &four).contains("tokens must have shape [3] but got [4]"));
}
