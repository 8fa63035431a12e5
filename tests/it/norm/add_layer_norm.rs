use mlx_primitives::{
    Dispatch, Result,
    norm::{LayerNormOptions, add_layer_norm},
};
use mlx_rs::{Array, Dtype, error::Exception, ops::stack, transforms::compile::compile};

use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    rows::ROWS,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "add_layer_norm";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    shape: &'static [i32],
    weighted: bool,
    biased: bool,
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, weighted: true, biased: true, strided: false }
}

/// Every option, beside the shapes that have none.
const OPTIONS: &[Case] = &[
    Case { biased: false, ..case("weight alone", &[3, 65]) },
    Case { weighted: false, ..case("bias alone", &[3, 65]) },
    Case { weighted: false, biased: false, ..case("neither", &[3, 65]) },
];

fn cases() -> impl Iterator<Item = Case> {
    ROWS.iter()
        .map(|rows| Case { strided: rows.strided, ..case(rows.name, rows.shape) })
        .chain(OPTIONS.iter().copied())
}

fn options(dispatch: Dispatch) -> LayerNormOptions {
    LayerNormOptions { eps: EPS, dispatch }
}

/// The normalized rows of a sum that is already rounded.
fn normalize(sum: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Tensor {
    let normed = sum.rows().flat_map(|row| {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        row.iter().enumerate().map(move |(i, v)| {
            let scale = weight.map_or(1.0, |w| w.values[i]) / (variance + f64::from(EPS)).sqrt();
            (v - mean) * scale + bias.map_or(0.0, |b| b.values[i])
        })
    });
    Tensor::new(&sum.shape, normed.collect())
}

fn add(x: &Tensor, residual: &Tensor) -> Tensor {
    let sums = x.values.iter().zip(&residual.values).map(|(a, b)| a + b);
    Tensor::new(&x.shape, sums.collect())
}

#[test]
fn both_outputs_match_the_oracle_on_every_backend() {
    for case in cases() {
        for dtype in FLOATING {
            let arrays = [1, 2].map(|seed| normal(seed, case.shape, dtype));
            let [x, residual] =
                if case.strided { arrays.map(|array| strided(&array)) } else { arrays };
            let dims = &case.shape[case.shape.len() - 1..];
            let weight = case.weighted.then(|| normal(3, dims, dtype));
            let bias = case.biased.then(|| normal(4, dims, dtype));
            // The norm is that of the sum as it is returned.
            let sum = add(&Tensor::of(&x), &Tensor::of(&residual));
            let sum = Tensor::of(&sum.to_array(dtype));
            let expected = normalize(
                &sum,
                weight.as_ref().map(Tensor::of).as_ref(),
                bias.as_ref().map(Tensor::of).as_ref(),
            );
            on_each_backend(
                OP,
                |dispatch| add_layer_norm(&x, &residual, &weight, &bias, options(dispatch)),
                |backend, (y, s)| {
                    assert_eq!((y.dtype(), s.dtype()), (dtype, dtype), "{}", case.name);
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&format!("{what}: sum"), &s, &sum, Tolerance::EXACT);
                    assert_close(&what, &y, &expected, Tolerance::on(OP, backend, dtype));
                },
            );
        }
    }
}

#[test]
fn parameters_of_another_dtype_keep_the_dtype_of_x() {
    let [x, residual] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float16));
    let (weight, bias) = (normal(3, &[64], Dtype::Float32), normal(4, &[64], Dtype::Bfloat16));
    let sum = add(&Tensor::of(&x), &Tensor::of(&residual)).to_array(Dtype::Float16);
    let expected =
        normalize(&Tensor::of(&sum), Some(&Tensor::of(&weight)), Some(&Tensor::of(&bias)));
    on_each_backend(
        OP,
        |dispatch| add_layer_norm(&x, &residual, &weight, &bias, options(dispatch)),
        |backend, (y, _)| {
            assert_eq!(y.dtype(), Dtype::Float16);
            let what = format!("{OP} mixed on {backend}");
            assert_close(&what, &y, &expected, Tolerance::on(OP, backend, Dtype::Float16));
        },
    );
}

/// With rows enough for every worker to take another turn, several to a simdgroup and several simdgroups to one.
const GRADIENT_SHAPES: [&[i32]; 2] = [&[5, 8, 5], &[3, 300]];

/// Of both outputs at once, and of the sum alone, where the gradient of the other is zeros.
#[test]
fn gradients_match_finite_differences() {
    let stacked = |y: Tensor, sum: Tensor| {
        Tensor::new(&[&[2], &y.shape[..]].concat(), [y.values, sum.values].concat())
    };
    for shape in GRADIENT_SHAPES {
        let dims = &shape[shape.len() - 1..];
        let inputs = [(3, shape), (4, shape), (5, dims), (6, dims)]
            .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)));
        for (weighted, biased) in [(true, true), (true, false), (false, true), (false, false)] {
            let count = 2 + usize::from(weighted) + usize::from(biased);
            let present = [0, 1, if weighted { 2 } else { 3 }, 3];
            let inputs: Vec<_> = present[..count].iter().map(|&i| inputs[i].clone()).collect();
            let bias_at = 2 + usize::from(weighted);
            gradients_on_each_backend(
                OP,
                &inputs,
                |inputs| {
                    let sum = add(&inputs[0], &inputs[1]);
                    let weight = weighted.then(|| &inputs[2]);
                    stacked(normalize(&sum, weight, biased.then(|| &inputs[bias_at])), sum)
                },
                |arrays, dispatch| {
                    let weight = weighted.then(|| &arrays[2]);
                    let bias = biased.then(|| &arrays[bias_at]);
                    let (y, sum) =
                        add_layer_norm(&arrays[0], &arrays[1], weight, bias, options(dispatch))?;
                    Ok(stack(&[y, sum], 0)?)
                },
            );
        }
        gradients_on_each_backend(
            OP,
            &inputs,
            |inputs| add(&inputs[0], &inputs[1]),
            |arrays, dispatch| {
                let [x, residual, weight, bias] = [0, 1, 2, 3].map(|i| &arrays[i]);
                Ok(add_layer_norm(x, residual, weight, bias, options(dispatch))?.1)
            },
        );
    }
}

#[test]
fn it_compiles() {
    let norm = |(x, residual, weight): (&Array, &Array, &Array)| -> Result<Array, Exception> {
        let (y, sum) = add_layer_norm(x, residual, weight, None, LayerNormOptions::default())?;
        y.add(sum)
    };
    let [x, residual] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float32));
    let weight = normal(3, &[64], Dtype::Float32);
    let compiled = compile(norm, None)((&x, &residual, &weight)).unwrap();
    let expected = Tensor::of(&norm((&x, &residual, &weight)).unwrap());
    assert_close("compiled", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let nine = normal(2, &[9], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |x: &Array, residual: &Array, weight: Option<&Array>, bias: Option<&Array>, eps| {
        let options = LayerNormOptions { eps, ..Default::default() };
        add_layer_norm(x, residual, weight, bias, options).unwrap_err().to_string()
    };
    assert_eq!(
        call(&x, &nine, None, None, EPS),
        "[add_layer_norm] residual must have shape [2, 8] but got [9]"
    );
    assert_eq!(
        call(&x, &normal(1, &[2, 8], Dtype::Float16), None, None, EPS),
        "[add_layer_norm] residual must have dtype Float32 but got Float16"
    );
    assert_eq!(
        call(&x, &x, Some(&nine), None, EPS),
        "[add_layer_norm] weight must have shape [8] but got [9]"
    );
    assert_eq!(
        call(&x, &x, None, Some(&nine), EPS),
        "[add_layer_norm] bias must have shape [8] but got [9]"
    );
    assert!(call(&ints, &ints, None, None, EPS).starts_with("[add_layer_norm] x must have dtype"));
    let weight = call(&x, &x, Some(&ints), None, EPS);
    assert!(weight.starts_with("[add_layer_norm] weight must have dtype"));
    let bias = call(&x, &x, None, Some(&ints), EPS);
    assert!(bias.starts_with("[add_layer_norm] bias must have dtype"));
    for shape in [&[][..], &[3, 0]] {
        let x = normal(1, shape, Dtype::Float32);
        let expected = "[add_layer_norm] x must have shape [..., D] with D at least 1 but got";
        assert!(call(&x, &x, None, None, EPS).starts_with(expected));
    }
    assert_eq!(
        call(&x, &x, None, None, -1.0),
        "[add_layer_norm] eps must be finite and at least 0 but got -1"
    );
}
