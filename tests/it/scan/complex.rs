//! Decays that turn.

use mlx_primitives::scan::{ScanOptions, affine_scan, affine_scan_with_state};
use mlx_rs::{Array, Dtype, complex64, transforms::grad};

use crate::support::sample::Random;

const LENGTH: usize = 40;
const CHANNELS: usize = 3;

fn numbers(seed: u64, count: usize) -> Vec<complex64> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| complex64::new(random.normal() as f32 / 2.0, random.normal() as f32 / 2.0))
        .collect()
}

#[test]
fn complex_decays_match_a_loop() {
    let (a, x, start) = (numbers(1, CHANNELS), numbers(2, LENGTH * CHANNELS), numbers(3, CHANNELS));
    let array = |values: &[complex64], shape: &[i32]| Array::from_slice(values, shape);
    let state = array(&start, &[3]);
    let options = ScanOptions { axis: 0, initial_state: Some(&state), ..Default::default() };
    let (y, last) = affine_scan_with_state(array(&a, &[3]), array(&x, &[40, 3]), options).unwrap();
    assert_eq!((y.dtype(), last.dtype()), (Dtype::Complex64, Dtype::Complex64));
    let got = y.as_slice::<complex64>();
    for channel in 0..CHANNELS {
        let wide = |value: complex64| (f64::from(value.re), f64::from(value.im));
        let (mut h, a) = (wide(start[channel]), wide(a[channel]));
        for t in 0..LENGTH {
            let x = wide(x[t * CHANNELS + channel]);
            h = (a.0 * h.0 - a.1 * h.1 + x.0, a.0 * h.1 + a.1 * h.0 + x.1);
            let got = wide(got[t * CHANNELS + channel]);
            let error = (got.0 - h.0).hypot(got.1 - h.1);
            assert!(
                error <= 1e-5 * (1.0 + h.0.hypot(h.1)),
                "step {t} of channel {channel}: {error}"
            );
        }
    }
    let ends = last.as_slice::<complex64>();
    assert_eq!(ends, &got[(LENGTH - 1) * CHANNELS..]);
}

#[test]
fn a_complex_decay_makes_a_real_input_complex() {
    let a = Array::from_complex(complex64::new(0.0, 1.0));
    let x = Array::from_slice(&[1.0_f32, 0.0, 0.0], &[3]);
    let y = affine_scan(&a, &x, ScanOptions::default()).unwrap();
    let turn = |re, im| complex64::new(re, im);
    assert_eq!(y.as_slice::<complex64>(), [turn(1.0, 0.0), turn(0.0, 1.0), turn(-1.0, 0.0)]);
}

#[test]
fn gradients_flow_to_the_angle_of_a_decay() {
    let x = Array::from_slice(&[1.0_f32, 0.5, -0.25, 2.0], &[4]);
    let loss = |angle: &Array| -> Result<Array, mlx_rs::error::Exception> {
        let turn = Array::from_complex(complex64::new(0.0, 1.0));
        let a = angle.multiply(turn)?.exp()?;
        affine_scan(&a, &x, ScanOptions::default())?.real()?.square()?.sum(None)
    };
    let at = |angle: f64| {
        let (mut re, mut im, mut sum) = (0.0, 0.0, 0.0);
        for x in [1.0, 0.5, -0.25, 2.0] {
            (re, im) =
                (angle.cos() * re - angle.sin() * im + x, angle.cos() * im + angle.sin() * re);
            sum += re * re;
        }
        sum
    };
    let angle = 0.7;
    let slope = (at(angle + 1e-5) - at(angle - 1e-5)) / 2e-5;
    let got = grad(loss)(&Array::from_f32(angle as f32)).unwrap();
    assert!((f64::from(got.item_exact::<f32>()) - slope).abs() < 1e-4, "{got:?} but {slope}");
}
