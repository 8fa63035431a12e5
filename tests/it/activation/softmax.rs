use mlx_primitives::{
    Dispatch, Result,
    activation::{SoftmaxOptions, softmax},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    transforms::{compile::compile, fallible_vjp},
};

use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    rows::ROWS,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "softmax";
/// Far from the default, so that an implementation which ignores it is found out.
const SCALE: f32 = 2.5;
const MASKED: f64 = f64::NEG_INFINITY;

struct Case {
    name: &'static str,
    shape: &'static [i32],
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, strided: false }
}

fn cases() -> impl Iterator<Item = Case> {
    ROWS.iter().map(|rows| Case { strided: rows.strided, ..case(rows.name, rows.shape) })
}

fn oracle(x: &Tensor, scale: f64) -> Tensor {
    let weights = x.rows().flat_map(|row| {
        let peak = row.iter().copied().fold(MASKED, f64::max);
        let powers: Vec<_> = row.iter().map(|v| (scale * (v - peak)).exp()).collect();
        let total = powers.iter().sum::<f64>();
        powers.into_iter().map(move |power| if peak == MASKED { 0.0 } else { power / total })
    });
    Tensor::new(&x.shape, weights.collect())
}

fn options(dispatch: Dispatch) -> SoftmaxOptions {
    SoftmaxOptions { scale: SCALE, dispatch }
}

fn matches_the_oracle(case: &str, x: &Array) {
    let expected = oracle(&Tensor::of(x), SCALE.into());
    on_each_backend(
        OP,
        |dispatch| softmax(x, options(dispatch)),
        |backend, y| {
            assert_eq!(y.dtype(), x.dtype(), "{case}");
            let what = format!("{OP} {case} {:?} on {backend}", x.dtype());
            assert_close(&what, &y, &expected, Tolerance::of(OP, x.dtype()));
        },
    );
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in cases() {
        for dtype in FLOATING {
            let x = normal(1, case.shape, dtype);
            let x = if case.strided { strided(&x) } else { x };
            matches_the_oracle(case.name, &x);
        }
    }
}

#[test]
fn a_whole_vocabulary_is_one_row() {
    for dtype in [Dtype::Bfloat16, Dtype::Float32] {
        let x = normal(1, &[1, 128_256], dtype);
        let expected = oracle(&Tensor::of(&x), SCALE.into());
        on_each_backend(
            OP,
            |dispatch| softmax(&x, options(dispatch)),
            |backend, y| {
                let what = format!("{OP} of 128256 {dtype:?} on {backend}");
                let tolerance = Tolerance::on("softmax of 128256", backend, dtype);
                assert_close(&what, &y, &expected, tolerance);
            },
        );
    }
}

#[test]
fn the_default_scale_is_one() {
    let x = normal(1, &[3, 65], Dtype::Float32);
    let expected = oracle(&Tensor::of(&x), 1.0);
    on_each_backend(
        OP,
        |dispatch| softmax(&x, SoftmaxOptions { dispatch, ..Default::default() }),
        |backend, y| {
            let what = format!("{OP} unscaled on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
        },
    );
}

/// A row each: all masked; all but one; the first half, so that whole simdgroups see nothing; none.
fn masked_rows(length: usize) -> Tensor {
    let visible = [0..0, 3..4, length / 2..length, 0..length];
    let x = Tensor::of(&normal(1, &[4, length as i32], Dtype::Float32));
    Tensor::from_fn(&x.shape, |i| if visible[i[0]].contains(&i[1]) { x.at(i) } else { MASKED })
}

#[test]
fn a_row_of_which_all_is_masked_is_zero() {
    for length in [8, 65, 4097] {
        for dtype in FLOATING {
            matches_the_oracle("masked", &masked_rows(length).to_array(dtype));
        }
    }
    let nothing = Tensor::new(&[1, 70_000], vec![MASKED; 70_000]);
    matches_the_oracle("masked", &nothing.to_array(Dtype::Float32));
}

#[test]
fn no_gradient_flows_from_a_masked_element() {
    for length in [8, 65] {
        let x = masked_rows(length);
        let y = oracle(&x, SCALE.into());
        let dy = Tensor::of(&normal(2, &[4, length as i32], Dtype::Float32));
        let dx = Tensor::from_fn(&x.shape, |i| {
            let dot = (0..length).map(|j| y.at(&[i[0], j]) * dy.at(&[i[0], j])).sum::<f64>();
            f64::from(SCALE) * y.at(i) * (dy.at(i) - dot)
        });
        let (x, dy) = (x.to_array(Dtype::Float32), dy.to_array(Dtype::Float32));
        on_each_backend(
            OP,
            |dispatch| gradient(&x, &dy, dispatch),
            |backend, gradient| {
                let what = format!("gradient of masked {OP} on {backend}");
                assert_close(&what, &gradient, &dx, Tolerance::GRADIENT);
            },
        );
    }
}

/// Refusals come from a plain call: a transformation would turn them into exceptions.
fn gradient(x: &Array, dy: &Array, dispatch: Dispatch) -> Result<Array> {
    softmax(x, options(dispatch))?;
    let run = |x: &[Array]| -> Result<Vec<Array>, Exception> {
        Ok(vec![softmax(&x[0], options(dispatch))?])
    };
    let (_, mut gradients) = fallible_vjp(run, std::slice::from_ref(x), std::slice::from_ref(dy))?;
    Ok(gradients.remove(0))
}

#[test]
fn what_is_no_number_is_not_hidden() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for row in [[1.0, nan, 2.0], [-inf, nan, -inf], [nan; 3], [1.0, inf, 2.0], [-inf, inf, inf]] {
        let x = Array::from_slice(&row, &[1, 3]);
        on_each_backend(
            OP,
            |dispatch| softmax(&x, options(dispatch)),
            |backend, y| {
                let y = Tensor::of(&y);
                assert!(y.values.iter().all(|v| v.is_nan()), "{row:?} on {backend}: {y:?}");
            },
        );
    }
}

#[test]
fn the_largest_numbers_and_scales_do_not_overflow() {
    let rows = [[f32::MAX, f32::MAX, f32::MIN], [f32::MIN, f32::NEG_INFINITY, f32::MIN]];
    for scale in [1.0, f32::MAX] {
        for (row, expected) in rows.into_iter().zip([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]) {
            let x = Array::from_slice(&row, &[1, 3]);
            on_each_backend(
                OP,
                |dispatch| softmax(&x, SoftmaxOptions { scale, dispatch }),
                |backend, y| {
                    let what = format!("{OP} of {row:?} times {scale} on {backend}");
                    let expected = Tensor::new(&[1, 3], expected.to_vec());
                    assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
                },
            );
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for shape in [&[2, 3, 5][..], &[1], &[2, 65]] {
        gradients_on_each_backend(
            OP,
            &[Tensor::of(&normal(3, shape, Dtype::Float32))],
            |inputs| oracle(&inputs[0], SCALE.into()),
            |arrays, dispatch| softmax(&arrays[0], options(dispatch)),
        );
    }
}

#[test]
fn gradients_of_long_rows_match_the_formula() {
    for (length, dtype) in
        [(1025, Dtype::Float16), (4097, Dtype::Bfloat16), (40_000, Dtype::Float32)]
    {
        let (x, dy) = (normal(3, &[2, length], dtype), normal(4, &[2, length], dtype));
        // Kernels read the rounded result, so the formula does too.
        let expected = |y: &Tensor| {
            let dy = Tensor::of(&dy);
            let dots = y.rows().zip(dy.rows()).map(|(y, dy)| {
                let dot = y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
                y.iter().zip(dy).map(move |(y, dy)| f64::from(SCALE) * y * (dy - dot)).collect()
            });
            Tensor::new(&y.shape, dots.collect::<Vec<Vec<_>>>().concat())
        };
        on_each_backend(
            OP,
            |dispatch| Ok((softmax(&x, options(dispatch))?, gradient(&x, &dy, dispatch)?).1),
            |backend, gradient| {
                let y = softmax(&x, options(Dispatch::Only(backend))).unwrap();
                let what = format!("gradient of {OP} {length} {dtype:?} on {backend}");
                let expected = expected(&Tensor::of(&y));
                assert_close(&what, &gradient, &expected, Tolerance::of(OP, dtype));
            },
        );
    }
}

#[test]
fn it_compiles() {
    let weights =
        |x: &Array| -> Result<Array, Exception> { Ok(softmax(x, options(Dispatch::Auto))?) };
    let x = normal(1, &[3, 64], Dtype::Float32);
    let compiled = compile(weights, None)(&x).unwrap();
    let expected = oracle(&Tensor::of(&x), SCALE.into());
    assert_close("compiled softmax", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let call = |x: &Array, scale| {
        softmax(x, SoftmaxOptions { scale, ..Default::default() }).unwrap_err().to_string()
    };
    let x = normal(1, &[2, 8], Dtype::Float32);
    assert_eq!(
        call(&Array::from_f32(1.0), 1.0),
        "[softmax] x must have shape [..., D] with D at least 1 but got []"
    );
    assert_eq!(
        call(&normal(1, &[3, 0], Dtype::Float32), 1.0),
        "[softmax] x must have shape [..., D] with D at least 1 but got [3, 0]"
    );
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    assert!(call(&ints, 1.0).starts_with("[softmax] x must have dtype Float32"));
    assert_eq!(call(&x, 0.0), "[softmax] scale must be finite and above 0 but got 0");
    assert_eq!(call(&x, f32::NAN), "[softmax] scale must be finite and above 0 but got NaN");
}
