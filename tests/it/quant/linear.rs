use mlx_primitives::{
    Dispatch, Result,
    quant::{QuantizedLinearOptions, QuantizedWeight, quantized_linear},
};
use mlx_rs::{Array, Dtype, error::Exception, transforms::compile::compile};

use super::{linear, quantized, unpacked};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "quantized_linear";

struct Case {
    name: &'static str,
    /// All but the last axis of `x`.
    leading: &'static [i32],
    weight: [i32; 2],
    group_size: i32,
    bits: i32,
    biased: bool,
    strided: bool,
}

const fn case(name: &'static str, leading: &'static [i32], weight: [i32; 2]) -> Case {
    Case { name, leading, weight, group_size: 32, bits: 4, biased: true, strided: false }
}

const CASES: &[Case] = &[
    case("a vector", &[], [7, 32]),
    case("one row", &[1], [8, 64]),
    case("one row of rank 4", &[1, 1, 1], [9, 64]),
    case("one output", &[3], [1, 32]),
    case("rank 3", &[2, 3], [33, 64]),
    case("15 rows", &[15], [8, 64]),
    case("16 rows", &[16], [8, 64]),
    case("no rows", &[0], [8, 64]),
    case("no rows of rank 3", &[2, 0], [8, 64]),
    Case { biased: false, ..case("unbiased", &[3], [8, 64]) },
    Case { strided: true, ..case("strided", &[2, 3], [8, 64]) },
    Case { strided: true, ..case("one strided row", &[1], [8, 64]) },
    Case { bits: 2, ..case("2 bits", &[3], [8, 64]) },
    Case { bits: 3, ..case("3 bits", &[3], [8, 64]) },
    Case { bits: 5, ..case("5 bits", &[3], [8, 64]) },
    Case { bits: 6, group_size: 64, ..case("6 bits", &[3], [8, 64]) },
    Case { bits: 8, group_size: 128, ..case("8 bits", &[3], [8, 256]) },
];

fn options(dispatch: Dispatch) -> QuantizedLinearOptions {
    QuantizedLinearOptions { dispatch }
}

fn x_of(case: &Case, dtype: Dtype) -> Array {
    let x = normal(1, &[case.leading, &case.weight[1..]].concat(), dtype);
    if case.strided { strided(&x) } else { x }
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for dtype in FLOATING {
            let x = x_of(case, dtype);
            let weight = quantized(case.weight, case.group_size, case.bits, dtype);
            let bias = case.biased.then(|| normal(2, &case.weight[..1], dtype));
            let expected =
                linear(&Tensor::of(&x), &unpacked(&weight), bias.as_ref().map(Tensor::of).as_ref());
            on_each_backend(
                OP,
                |dispatch| quantized_linear(&x, &weight, &bias, options(dispatch)),
                |backend, y| {
                    assert_eq!(y.dtype(), dtype, "{}", case.name);
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&what, &y, &expected, Tolerance::on(OP, backend, dtype));
                },
            );
        }
    }
}

#[test]
fn the_dtype_is_that_of_x_whatever_the_scales_and_the_bias() {
    for dtype in FLOATING {
        for other in FLOATING {
            let x = normal(1, &[3, 64], dtype);
            let weight = quantized([8, 64], 32, 4, other);
            let bias = normal(2, &[8], other);
            let expected = linear(&Tensor::of(&x), &unpacked(&weight), Some(&Tensor::of(&bias)));
            on_each_backend(
                OP,
                |dispatch| quantized_linear(&x, &weight, &bias, options(dispatch)),
                |backend, y| {
                    assert_eq!(y.dtype(), dtype);
                    let what = format!("{OP} {dtype:?} with {other:?} on {backend}");
                    assert_close(&what, &y, &expected, Tolerance::on(OP, backend, dtype));
                },
            );
        }
    }
}

#[test]
fn halves_are_summed_in_f32() {
    let x = Array::ones::<f32>(&[1, 4096]).unwrap().as_dtype(Dtype::Float16).unwrap();
    let ones = Array::ones::<f32>(&[2, 4096]).unwrap().as_dtype(Dtype::Float16).unwrap();
    let weight = QuantizedWeight::quantize(ones, 64, 4).unwrap();
    let expected = Tensor::new(&[1, 2], vec![4096.0; 2]);
    on_each_backend(
        OP,
        |dispatch| quantized_linear(&x, &weight, None, options(dispatch)),
        |backend, y| {
            let what = format!("{OP} of 4096 ones on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float16));
        },
    );
}

#[test]
fn a_large_weight_is_multiplied_as_a_small_one() {
    let weight = quantized([1 << 16, 32], 32, 4, Dtype::Float32);
    let matrix = Tensor::of(&weight.dequantize(Dtype::Float32).unwrap());
    let (x, bias) = (normal(1, &[1, 32], Dtype::Float32), normal(2, &[1 << 16], Dtype::Float32));
    let expected = linear(&Tensor::of(&x), &matrix, Some(&Tensor::of(&bias)));
    on_each_backend(
        OP,
        |dispatch| quantized_linear(&x, &weight, &bias, options(dispatch)),
        |backend, y| {
            let what = format!("{OP} of a large weight on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
        },
    );
}

#[test]
fn gradients_match_finite_differences() {
    for rows in [1, 3, 17] {
        let weight = quantized([5, 32], 32, 4, Dtype::Float32);
        let matrix = unpacked(&weight);
        let inputs = [normal(3, &[rows, 32], Dtype::Float32), normal(4, &[5], Dtype::Float32)];
        gradients_on_each_backend(
            OP,
            &inputs.map(|array| Tensor::of(&array)),
            |inputs| linear(&inputs[0], &matrix, Some(&inputs[1])),
            |arrays, dispatch| quantized_linear(&arrays[0], &weight, &arrays[1], options(dispatch)),
        );
    }
}

#[test]
fn it_compiles() {
    let weight = quantized([8, 64], 32, 4, Dtype::Float32);
    let product = {
        let weight = weight.clone();
        move |x: &Array| -> Result<Array, Exception> {
            Ok(quantized_linear(x, &weight, None, QuantizedLinearOptions::default())?)
        }
    };
    let x = normal(1, &[3, 64], Dtype::Float32);
    let compiled = compile(product, None)(&x).unwrap();
    let expected = linear(&Tensor::of(&x), &unpacked(&weight), None);
    assert_close("compiled", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let weight = quantized([8, 64], 32, 4, Dtype::Float32);
    let call = |x: &Array, bias: Option<&Array>| {
        let options = QuantizedLinearOptions::default();
        quantized_linear(x, &weight, bias, options).unwrap_err().to_string()
    };
    let x = normal(1, &[2, 64], Dtype::Float32);
    let ints = Array::zeros::<i32>(&[8]).unwrap();
    assert_eq!(
        call(&normal(1, &[2, 63], Dtype::Float32), None),
        "[quantized_linear] x must have shape [..., 64] but got [2, 63]"
    );
    assert!(call(&Array::from_f32(1.0), None).contains("x must have shape [..., 64]"));
    assert!(call(&normal(1, &[2, 0], Dtype::Float32), None).contains("x must have shape"));
    assert!(call(&ints, None).contains("x must have dtype Float32"));
    assert!(call(&x, Some(&ints)).contains("bias must have dtype Float32"));
    assert_eq!(
        call(&x, Some(&normal(2, &[9], Dtype::Float32))),
        "[quantized_linear] bias must have shape [8] but got [9]"
    );
}
