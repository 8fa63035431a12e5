use mlx_primitives::{
    Result,
    scan::{ScanOptions, affine_scan, affine_scan_with_state},
};
use mlx_rs::{Array, Dtype, error::Exception, transforms::compile::compile};

use super::{
    cases::{CASES, Case},
    oracle::{self, Ask},
};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "affine_scan";

/// Decays of either sign, not far from 1.
pub(super) fn decays(seed: u64, shape: &[i32], dtype: Dtype) -> Array {
    mlx_rs::ops::tanh(normal(seed, shape, Dtype::Float32)).unwrap().as_dtype(dtype).unwrap()
}

/// The shape of decays that vary along some axes only, a different choice for each case.
fn shape_of_decay(number: usize, case: &Case) -> Vec<i32> {
    let ones = [!0, !0, 0b001, 0b110, 0b010, !0][number % 6];
    let sizes = case.shape.iter().enumerate();
    sizes.map(|(axis, &size)| if ones >> axis & 1 == 1 { size } else { 1 }).collect()
}

#[test]
fn results_match_the_oracle_on_every_backend() {
    for (number, case) in CASES.iter().enumerate() {
        let (dtype, of_a) = (FLOATING[number % 3], FLOATING[number / 2 % 3]);
        let a = decays(3, &shape_of_decay(number, case), of_a);
        let (x, state) = (case.x(dtype), case.state());
        let wide_state = state.as_ref().map(Tensor::of);
        let expected =
            oracle::affine(&Tensor::of(&a), &Tensor::of(&x), wide_state.as_ref(), case.ask);
        on_each_backend(
            OP,
            |dispatch| {
                let options = case.options(state.as_ref(), dispatch);
                affine_scan_with_state(&a, &x, options)
            },
            |backend, (y, last)| {
                let what = format!("{OP} {} {dtype:?} by {of_a:?} on {backend}", case.name);
                assert_eq!((y.dtype(), last.dtype()), (dtype, Dtype::Float32), "{what}");
                assert_close(&what, &y, &expected[0], Tolerance::of(OP, dtype));
                let tolerance = Tolerance::of(OP, Dtype::Float32);
                assert_close(&format!("{what}: state"), &last, &expected[1], tolerance);
            },
        );
    }
}

#[test]
fn decays_of_lower_rank_broadcast() {
    let (a, x) = (decays(1, &[3], Dtype::Float32), normal(2, &[2, 9, 3], Dtype::Float32));
    let wide = Tensor::new(&[1, 1, 3], Tensor::of(&a).values);
    let [expected, _] = oracle::affine(&wide, &Tensor::of(&x), None, Ask::along(1));
    on_each_backend(
        OP,
        |dispatch| affine_scan(&a, &x, ScanOptions { axis: 1, dispatch, ..Default::default() }),
        |backend, y| {
            let what = format!("{OP} by three decays on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
        },
    );
}

#[test]
fn nothing_of_a_segment_reaches_the_next() {
    let mut x = Tensor::of(&normal(1, &[60, 2], Dtype::Float32));
    x.values[60..80].fill(f64::NAN);
    x.values[4] = f64::INFINITY;
    let (x, a) = (x.to_array(Dtype::Float32), decays(2, &[60, 2], Dtype::Float32));
    for reverse in [false, true] {
        on_each_backend(
            OP,
            |dispatch| {
                let segments = Some(&[0, 20, 45, 60][..]);
                let options =
                    ScanOptions { axis: 0, reverse, segments, dispatch, ..Default::default() };
                affine_scan_with_state(&a, &x, options)
            },
            |backend, (y, last)| {
                let finite = |array: &Array| {
                    Tensor::of(array).values.iter().map(|v| v.is_finite()).collect::<Vec<_>>()
                };
                let what = format!("{OP} beside NaN on {backend}");
                assert!(finite(&y)[90..].iter().all(|&finite| finite), "{what}");
                assert!(!finite(&y)[60], "{what}");
                assert_eq!(finite(&last)[4..], [true; 2], "{what}");
            },
        );
    }
}

#[test]
fn it_compiles() {
    let scan = |(a, x): (&Array, &Array)| -> Result<Array, Exception> {
        Ok(affine_scan(a, x, ScanOptions { axis: 1, ..Default::default() })?)
    };
    let (a, x) = (decays(1, &[2, 9, 3], Dtype::Float32), normal(2, &[2, 9, 3], Dtype::Float32));
    let compiled = compile(scan, None)((&a, &x)).unwrap();
    let expected = Tensor::of(&scan((&a, &x)).unwrap());
    assert_close("compiled affine scan", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}
