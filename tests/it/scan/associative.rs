use mlx_primitives::{
    Result,
    scan::{ScanOperator, ScanOptions, associative_scan, associative_scan_with_state},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    transforms::{compile::compile, fallible_vjp},
};

use super::{cases::CASES, oracle};
use crate::support::{
    FLOATING,
    backends::{on_backends, on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "associative_scan";

const OPERATORS: [ScanOperator; 5] = [
    ScanOperator::Add,
    ScanOperator::Mul,
    ScanOperator::Max,
    ScanOperator::Min,
    ScanOperator::LogAddExp,
];

#[test]
fn results_match_the_oracle_on_every_backend() {
    for (number, case) in CASES.iter().enumerate() {
        for (turn, operator) in OPERATORS.into_iter().enumerate() {
            let dtype = FLOATING[(number + turn) % 3];
            let (x, state) = (case.x(dtype), case.state());
            let wide_state = state.as_ref().map(Tensor::of);
            let expected =
                oracle::associative(operator, &Tensor::of(&x), wide_state.as_ref(), case.ask);
            let op = format!("{OP} {operator:?}");
            on_backends(
                with_kernels(turn == number % OPERATORS.len()),
                OP,
                |dispatch| {
                    let options = case.options(state.as_ref(), dispatch);
                    associative_scan_with_state(&x, operator, options)
                },
                |backend, (y, last)| {
                    let what = format!("{op} {} {dtype:?} on {backend}", case.name);
                    assert_eq!((y.dtype(), last.dtype()), (dtype, Dtype::Float32), "{what}");
                    assert_close(&what, &y, &expected[0], Tolerance::of(&op, dtype));
                    let tolerance = Tolerance::of(&op, Dtype::Float32);
                    assert_close(&format!("{what}: state"), &last, &expected[1], tolerance);
                },
            );
        }
    }
}

#[test]
fn half_precision_is_added_up_in_f32() {
    // In f16 a sum of ones ends at 2048, and in bf16 at 256.
    for dtype in [Dtype::Float16, Dtype::Bfloat16] {
        let ones = Array::ones::<f32>(&[3000, 2]).unwrap().as_dtype(dtype).unwrap();
        let expected = Tensor::from_fn(&[3000, 2], |index| index[0] as f64 + 1.0);
        on_each_backend(
            OP,
            |dispatch| {
                let options = ScanOptions { axis: 0, dispatch, ..Default::default() };
                associative_scan_with_state(&ones, ScanOperator::Add, options)
            },
            |backend, (y, last)| {
                let what = format!("{OP} of ones, {dtype:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                assert_close(&what, &last, &Tensor::new(&[2], vec![3000.0; 2]), Tolerance::EXACT);
            },
        );
    }
}

#[test]
fn infinities_go_through() {
    let x = Array::from_slice(&[f32::NEG_INFINITY, f32::NEG_INFINITY, 0.5, -1e30, 0.5], &[5]);
    for operator in [ScanOperator::LogAddExp, ScanOperator::Max] {
        let [expected, _] =
            oracle::associative(operator, &Tensor::of(&x), None, oracle::Ask::along(0));
        on_each_backend(
            OP,
            |dispatch| {
                let options = ScanOptions { dispatch, ..Default::default() };
                associative_scan(&x, operator, options)
            },
            |backend, y| {
                let what = format!("{OP} {operator:?} of infinities on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
            },
        );
    }
}

/// The gradient of a scan along axis 0 on each backend, by a cotangent.
fn slopes(
    operator: ScanOperator,
    x: &[f32],
    segments: Option<&[i32]>,
    dy: &[f32],
) -> Vec<Vec<f64>> {
    let array = |values: &[f32]| Array::from_slice(values, &[values.len() as i32]);
    let mut found = Vec::new();
    on_each_backend(
        OP,
        |dispatch| {
            let options = ScanOptions { dispatch, segments, ..Default::default() };
            associative_scan(array(x), operator, options)?;
            let scan = |x: &[Array]| -> Result<Vec<Array>, Exception> {
                Ok(vec![associative_scan(&x[0], operator, options)?])
            };
            Ok(fallible_vjp(scan, &[array(x)], &[array(dy)])?.1.swap_remove(0))
        },
        |_, dx| found.push(Tensor::of(&dx).values),
    );
    found
}

#[test]
fn infinities_have_finite_gradients() {
    let none = f32::NEG_INFINITY;
    for x in [[none, 0.0, 1.0, none], [none, none, 2.0, 0.5]] {
        // Of the last sum the gradient is the softmax, which has nothing of −∞.
        let weights = x.map(|x| f64::from(x).exp());
        let total = weights.iter().sum::<f64>();
        let dy = [0.0, 0.0, 0.0, 1.0];
        for dx in slopes(ScanOperator::LogAddExp, &x, None, &dy) {
            let off = dx.iter().zip(weights).map(|(dx, weight)| (dx - weight / total).abs());
            assert!(off.fold(0.0, f64::max) < 1e-6, "{x:?}: {dx:?}");
        }
        for dx in slopes(ScanOperator::LogAddExp, &x, Some(&[0, 1, 4]), &dy) {
            assert!(dx.iter().all(|dx| dx.is_finite()), "{x:?}: {dx:?}");
        }
    }
}

#[test]
fn what_overflows_in_a_sequence_leaves_the_gradient_of_the_next_alone() {
    // 2^200 is no f32; of the second sequence only the first element's product with one other is asked for.
    let mut dy = [0.0; 210];
    dy[201] = 1.0;
    for dx in slopes(ScanOperator::Mul, &[2.0; 210], Some(&[0, 200, 210]), &dy) {
        assert_eq!(dx[200..202], [2.0, 2.0]);
        assert!(dx[202..].iter().all(|&dx| dx == 0.0), "{dx:?}");
    }
}

#[test]
fn it_compiles() {
    let sums = |x: &Array| -> Result<Array, Exception> {
        let options = ScanOptions { axis: 1, ..Default::default() };
        Ok(associative_scan(x, ScanOperator::Add, options)?)
    };
    let x = normal(1, &[2, 9, 3], Dtype::Float32);
    let compiled = compile(sums, None)(&x).unwrap();
    let expected = Tensor::of(&sums(&x).unwrap());
    assert_close("compiled scan", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}
