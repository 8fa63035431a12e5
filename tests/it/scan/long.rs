//! Long axes, and decays near 1 and near 0.

use mlx_primitives::{
    Backend, Dispatch,
    scan::{ScanOperator, ScanOptions, affine_scan_with_state, associative_scan},
};
use mlx_rs::{Array, Dtype};

use super::oracle::{self, Ask};
use crate::support::{
    backends::{on_backends, with_kernels},
    compare::{Tolerance, assert_close},
    sample::{Random, normal},
    tensor::Tensor,
};

const LENGTH: usize = 65536;
const PLAIN: [Backend; 2] = [Backend::Builtin, Backend::Reference];

/// Uniform in `low..high`.
fn between(seed: u64, low: f64, high: f64) -> Tensor {
    let mut random = Random::new(seed);
    let values = (0..2 * LENGTH).map(|_| low + random.unit() * (high - low)).collect();
    Tensor::new(&[LENGTH, 2], values)
}

#[test]
fn long_affine_scans_are_stable() {
    let x = normal(1, &[LENGTH as i32, 2], Dtype::Float32);
    for (low, high, op) in [
        (0.999, 1.0, "affine_scan, long"),
        (0.0, 1e-30, "affine_scan, long"),
        (-1.0, 1.0, "affine_scan, long"),
        (0.9999, 0.9999, "affine_scan, long memory"),
    ] {
        let a = between(2, low, high).to_array(Dtype::Float32);
        let expected = oracle::affine(&Tensor::of(&a), &Tensor::of(&x), None, Ask::along(0));
        on_backends(
            with_kernels(low == 0.999),
            "affine_scan",
            |dispatch| {
                let options = ScanOptions { axis: 0, dispatch, ..Default::default() };
                affine_scan_with_state(&a, &x, options)
            },
            |backend, (y, last)| {
                let what = format!("{LENGTH} with decays in {low}..{high} on {backend}");
                assert_close(&what, &y, &expected[0], Tolerance::of(op, Dtype::Float32));
                assert_close(&what, &last, &expected[1], Tolerance::of(op, Dtype::Float32));
            },
        );
    }
}

/// Beyond the range of f32 there is no number to be right about.
#[test]
fn decays_above_one_are_right_until_they_overflow() {
    let (a, x) = (Array::from_f32(1.5), Array::ones::<f32>(&[2000]).unwrap());
    let decay = Tensor::new(&[1], vec![1.5]);
    let [expected, _] = oracle::affine(&decay, &Tensor::of(&x), None, Ask::along(0));
    let (y, _) = affine_scan_with_state(&a, &x, ScanOptions::default()).unwrap();
    for (got, expected) in Tensor::of(&y).values.iter().zip(&expected.values) {
        match *expected < 1e38 {
            true => assert!((got / expected - 1.0).abs() < 1e-5, "{got} but {expected}"),
            false => assert!(got.is_nan() || *got > 1e37, "{got} but {expected}"),
        }
    }
}

#[test]
fn long_sums_of_exponentials_are_stable() {
    let x = normal(1, &[2, LENGTH as i32], Dtype::Float32);
    let expected =
        oracle::associative(ScanOperator::LogAddExp, &Tensor::of(&x), None, Ask::along(1));
    for backend in PLAIN {
        let options = ScanOptions { dispatch: Dispatch::Only(backend), ..Default::default() };
        let y = associative_scan(&x, ScanOperator::LogAddExp, options).unwrap();
        let what = format!("long sums of exponentials on {backend}");
        assert_close(
            &what,
            &y,
            &expected[0],
            Tolerance::on("logaddexp, long", backend, Dtype::Float32),
        );
    }
}
