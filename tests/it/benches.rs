//! The parts of `benches/` that could make a wrong figure look right. A bench binary has no tests of
//! its own.

#[path = "../../benches/support/backend.rs"]
mod backend;
#[path = "../../benches/support/blas.rs"]
mod blas;
#[path = "../../benches/support/check.rs"]
mod check;

use mlx_primitives::{
    Backend, Dispatch,
    norm::{RmsNormOptions, rms_norm},
};
use mlx_rs::{Array, Dtype};

use self::check::{Tolerance, compare};

fn verdict(got: &Array, expected: &Array, tolerance: Tolerance) -> Result<f64, String> {
    let (got, expected) = ([got.clone()], [expected.clone()]);
    compare(&got, &expected, got[0].dtype(), tolerance).map_err(|error| error.to_string())
}

#[test]
fn one_wrong_element_is_found_and_small_errors_are_reported() {
    let tolerance = Tolerance::of(Dtype::Float32).with_atol(1e-3);
    let expected = Array::from_slice(&[0.0_f32, 1.0, -2.0], &[3]);
    let near = Array::from_slice(&[0.0_f32, 1.0, -2.0005], &[3]);
    let far = Array::from_slice(&[0.0_f32, 1.0, -2.01], &[3]);
    let error = verdict(&near, &expected, tolerance).unwrap();
    assert!((error - 5e-4).abs() < 1e-6, "{error}");
    assert!(verdict(&far, &expected, tolerance).is_err());
    let far = Array::from_slice(&[0.0_f32, 1.0, -2.003], &[3]);
    assert!(verdict(&far, &expected, tolerance).is_err());
    assert!(verdict(&far, &expected, tolerance.of_baseline(Dtype::Float32)).is_ok());
}

#[test]
fn what_is_no_number_is_never_right() {
    let tolerance = Tolerance::of(Dtype::Float32);
    for odd in [f32::NAN, f32::INFINITY] {
        let (odd, plain) = (Array::from_f32(odd), Array::from_f32(1.0));
        assert!(verdict(&odd, &plain, tolerance).is_err());
        assert!(verdict(&plain, &odd, tolerance).is_err());
    }
}

#[test]
fn another_shape_dtype_or_count_is_refused() {
    let tolerance = Tolerance::of(Dtype::Float32);
    let row = Array::zeros::<f32>(&[1, 3]).unwrap();
    let flat = row.reshape(&[3]).unwrap();
    assert!(verdict(&flat, &row, tolerance).is_err());
    let wide = [row.clone()];
    assert!(compare(&wide, &wide, Dtype::Float16, tolerance).is_err());
    assert!(compare(&[], &wide, Dtype::Float32, tolerance).is_err());
}

#[test]
fn the_backend_that_ran_is_heard_of() {
    let x = Array::ones::<f32>(&[2, 8]).unwrap();
    let call = |dispatch| rms_norm(&x, None, RmsNormOptions { dispatch, ..Default::default() });
    for backend in [Backend::Builtin, Backend::Reference] {
        let (result, heard) = backend::taken_by(|| call(Dispatch::Only(backend)));
        assert!(result.is_ok());
        assert_eq!(heard, Some(backend.to_string()));
    }
    assert_eq!(backend::taken_by(|| ()).1, None);
}

#[test]
fn libraries_go_by_the_names_they_are_known_by() {
    let maps = "7f00-7f01 r-xp 0 08:01 1 /usr/lib/libc.so.6\n7f02-7f03 rw-p 0 00:00 0 \n\
                7f04-7f05 r-xp 0 08:01 2 /usr/lib/openblas-pthread/libopenblasp-r0.3.21.so\n";
    assert_eq!(blas::among(maps, "blas"), Some("libopenblasp-r0.3.21.so"));
    assert_eq!(blas::among(maps, "libcublas"), None);
    assert_eq!(blas::sold_as("libopenblasp-r0.3.21.so"), "OpenBLAS 0.3.21");
    assert_eq!(blas::sold_as("libcublasLt.so.13.1.0.3"), "cuBLAS 13.1.0.3");
    assert_eq!(blas::sold_as("libblas.so.3"), "libblas.so.3");
}
