use mlx_primitives::{
    Dispatch, Result,
    norm::{RmsNormOptions, add_rms_norm},
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

const OP: &str = "add_rms_norm";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    shape: &'static [i32],
    unit_offset: bool,
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, unit_offset: false, strided: false }
}

/// Every option, beside the shapes that have none.
const OPTIONS: &[Case] = &[Case { unit_offset: true, ..case("1 + weight", &[3, 65]) }];

fn cases() -> impl Iterator<Item = Case> {
    ROWS.iter()
        .map(|rows| Case { strided: rows.strided, ..case(rows.name, rows.shape) })
        .chain(OPTIONS.iter().copied())
}

fn options(unit_offset: bool, dispatch: Dispatch) -> RmsNormOptions {
    RmsNormOptions { eps: EPS, unit_offset, dispatch }
}

/// The normalized rows of a sum that is already rounded.
fn normalize(sum: &Tensor, weight: &Tensor, unit_offset: bool) -> Tensor {
    let normed = sum.rows().flat_map(|row| {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        let offset = if unit_offset { 1.0 } else { 0.0 };
        row.iter().enumerate().map(move |(i, v)| v * scale * (weight.values[i] + offset))
    });
    Tensor::new(&sum.shape, normed.collect())
}

fn add(x: &Tensor, residual: &Tensor) -> Tensor {
    let sums = x.values.iter().zip(&residual.values).map(|(a, b)| a + b);
    Tensor::new(&x.shape, sums.collect())
}

/// As the operation documents it, the norm is that of the sum as it is returned.
fn rounded(tensor: &Tensor, dtype: Dtype) -> Tensor {
    Tensor::of(&tensor.to_array(dtype))
}

#[test]
fn both_outputs_match_the_oracle_on_every_backend() {
    for case in cases() {
        for dtype in FLOATING {
            let arrays = [1, 2].map(|seed| normal(seed, case.shape, dtype));
            let [x, residual] =
                if case.strided { arrays.map(|array| strided(&array)) } else { arrays };
            let weight = normal(3, &case.shape[case.shape.len() - 1..], dtype);
            let sum = rounded(&add(&Tensor::of(&x), &Tensor::of(&residual)), dtype);
            let expected = normalize(&sum, &Tensor::of(&weight), case.unit_offset);
            on_each_backend(
                OP,
                |dispatch| {
                    add_rms_norm(&x, &residual, &weight, options(case.unit_offset, dispatch))
                },
                |backend, (y, s)| {
                    assert_eq!((y.dtype(), s.dtype()), (dtype, dtype), "{}", case.name);
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&format!("{what}: sum"), &s, &sum, Tolerance::EXACT);
                    assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                },
            );
        }
    }
}

#[test]
fn a_weight_of_another_dtype_keeps_the_dtype_of_x() {
    for (of_x, of_weight) in [
        (Dtype::Float16, Dtype::Float32),
        (Dtype::Float32, Dtype::Float16),
        (Dtype::Float16, Dtype::Bfloat16),
    ] {
        let [x, residual] = [1, 2].map(|seed| normal(seed, &[3, 64], of_x));
        let weight = normal(3, &[64], of_weight);
        let sum = rounded(&add(&Tensor::of(&x), &Tensor::of(&residual)), of_x);
        let expected = normalize(&sum, &Tensor::of(&weight), false);
        on_each_backend(
            OP,
            |dispatch| add_rms_norm(&x, &residual, &weight, options(false, dispatch)),
            |backend, (y, _)| {
                assert_eq!(y.dtype(), of_x);
                let what = format!("{OP} {of_x:?} with {of_weight:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, of_x));
            },
        );
    }
}

#[test]
fn large_half_precision_rows_do_not_overflow() {
    let large = Array::from_f32(1e4).as_dtype(Dtype::Float16).unwrap();
    let [x, residual] =
        [1, 2].map(|seed| normal(seed, &[2, 4096], Dtype::Float16).multiply(&large).unwrap());
    let weight = normal(3, &[4096], Dtype::Float16);
    // The sum of such numbers would itself be infinite now and then.
    let residual = residual.multiply(Array::from_f32(0.25).as_dtype(Dtype::Float16).unwrap());
    let residual = residual.unwrap();
    let sum = rounded(&add(&Tensor::of(&x), &Tensor::of(&residual)), Dtype::Float16);
    let expected = normalize(&sum, &Tensor::of(&weight), false);
    on_each_backend(
        OP,
        |dispatch| add_rms_norm(&x, &residual, &weight, options(false, dispatch)),
        |backend, (y, _)| {
            let what = format!("{OP} large on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float16));
        },
    );
}

/// With rows enough for every worker to take another turn, several to a simdgroup and several simdgroups to one.
const GRADIENT_SHAPES: [&[i32]; 2] = [&[5, 8, 5], &[3, 300]];

/// Of either output alone, where the gradient of the other is zeros, and of both at once.
#[test]
fn gradients_match_finite_differences() {
    type Pick<T> = fn(T, T) -> T;
    let stacked = |y: Tensor, sum: Tensor| {
        Tensor::new(&[&[2], &y.shape[..]].concat(), [y.values, sum.values].concat())
    };
    let both: (Pick<Tensor>, Pick<Array>) = (stacked, |y, sum| stack(&[y, sum], 0).unwrap());
    let picks: [(Pick<Tensor>, Pick<Array>); 3] =
        [(|y, _| y, |y, _| y), (|_, sum| sum, |_, sum| sum), both];
    for shape in GRADIENT_SHAPES {
        let inputs = [(3, shape), (4, shape), (5, &shape[shape.len() - 1..])]
            .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)));
        for unit_offset in [false, true] {
            for (of_tensors, of_arrays) in picks {
                gradients_on_each_backend(
                    OP,
                    &inputs,
                    |inputs| {
                        let sum = add(&inputs[0], &inputs[1]);
                        of_tensors(normalize(&sum, &inputs[2], unit_offset), sum)
                    },
                    |arrays, dispatch| {
                        let options = options(unit_offset, dispatch);
                        let (y, sum) = add_rms_norm(&arrays[0], &arrays[1], &arrays[2], options)?;
                        Ok(of_arrays(y, sum))
                    },
                );
            }
        }
    }
}

#[test]
fn it_compiles() {
    let norm = |(x, residual, weight): (&Array, &Array, &Array)| -> Result<Array, Exception> {
        let (y, sum) = add_rms_norm(x, residual, weight, RmsNormOptions::default())?;
        y.add(sum)
    };
    let [x, residual] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float32));
    let weight = normal(3, &[64], Dtype::Float32);
    let compiled = compile(norm, None)((&x, &residual, &weight)).unwrap();
    let expected = Tensor::of(&norm((&x, &residual, &weight)).unwrap());
    assert_close("compiled add_rms_norm", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let weight = normal(2, &[8], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |x: &Array, residual: &Array, weight: &Array, eps| {
        let options = RmsNormOptions { eps, ..Default::default() };
        add_rms_norm(x, residual, weight, options).unwrap_err().to_string()
    };
    assert_eq!(
        call(&x, &weight, &weight, EPS),
        "[add_rms_norm] residual must have shape [2, 8] but got [8]"
    );
    assert_eq!(
        call(&x, &normal(1, &[2, 8], Dtype::Float16), &weight, EPS),
        "[add_rms_norm] residual must have dtype Float32 but got Float16"
    );
    assert_eq!(
        call(&x, &x, &normal(2, &[9], Dtype::Float32), EPS),
        "[add_rms_norm] weight must have shape [8] but got [9]"
    );
    assert!(call(&x, &x, &ints, EPS).starts_with("[add_rms_norm] weight must have dtype Float32"));
    assert!(call(&ints, &ints, &weight, EPS).starts_with("[add_rms_norm] x must have dtype"));
    for shape in [&[][..], &[3, 0]] {
        let x = normal(1, shape, Dtype::Float32);
        let expected = "[add_rms_norm] x must have shape [..., D] with D at least 1 but got";
        assert!(call(&x, &x, &weight, EPS).starts_with(expected));
    }
    assert_eq!(
        call(&x, &x, &weight, -1.0),
        "[add_rms_norm] eps must be finite and at least 0 but got -1"
    );
}
