use mlx_primitives::scan::{ScanOperator, ScanOptions, affine_scan, associative_scan};
use mlx_primitives::{Backend, Dispatch};
use mlx_rs::{Array, Dtype, ops::broadcast_to};

use crate::support::sample::normal;

fn affine(a: &Array, x: &Array, options: ScanOptions) -> String {
    affine_scan(a, x, options).unwrap_err().to_string()
}

fn sum(x: &Array, options: ScanOptions) -> String {
    associative_scan(x, ScanOperator::Add, options).unwrap_err().to_string()
}

#[test]
fn bad_arrays_are_errors_that_name_them() {
    let x = normal(1, &[2, 8, 3], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let options = ScanOptions { axis: 1, ..Default::default() };
    assert_eq!(
        affine(&normal(1, &[8], Dtype::Float32), &x, options),
        "[affine_scan] a must have shape broadcastable to [2, 8, 3] but got [8]"
    );
    assert!(affine(&ints, &x, options).starts_with(
        "[affine_scan] a must have dtype Float32 or Float16 or Bfloat16 or Complex64"
    ));
    assert!(affine(&x, &ints, options).starts_with("[affine_scan] x must have dtype"));
    assert!(sum(&ints, options).starts_with("[associative_scan] x must have dtype Float32"));
    let complex = x.as_dtype(Dtype::Complex64).unwrap();
    assert!(sum(&complex, options).ends_with("but got Complex64"));
}

#[test]
fn bad_axes_are_errors() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    for axis in [2, -3, i32::MIN, i32::MAX] {
        let expected =
            format!("[associative_scan] axis must be an axis of x, which has 2 but got {axis}");
        assert_eq!(sum(&x, ScanOptions { axis, ..Default::default() }), expected);
    }
    let scalar = Array::from_f32(1.0);
    let refused = affine(&scalar, &scalar, ScanOptions::default());
    assert_eq!(refused, "[affine_scan] axis must be an axis of x, which has 0 but got -1");
}

#[test]
fn bad_states_are_errors() {
    let x = normal(1, &[2, 8, 3], Dtype::Float32);
    let ask = |state: &Array, segments: Option<&[i32]>| {
        sum(&x, ScanOptions { axis: 1, initial_state: Some(state), segments, ..Default::default() })
    };
    assert_eq!(
        ask(&x, None),
        "[associative_scan] initial_state must have shape [2, 3] but got [2, 8, 3]"
    );
    assert_eq!(
        ask(&normal(1, &[2, 3], Dtype::Float32), Some(&[0, 4, 8])),
        "[associative_scan] initial_state must have shape [2, 2, 3] but got [2, 3]"
    );
    let ints = Array::from_slice(&[0_i32; 6], &[2, 3]);
    assert!(
        ask(&ints, None).starts_with("[associative_scan] initial_state must have dtype Float32")
    );
    let complex = ints.as_dtype(Dtype::Complex64).unwrap();
    assert!(ask(&complex, None).ends_with("but got Complex64"));
}

#[test]
fn bad_segments_are_errors() {
    let x = normal(1, &[2, 8, 3], Dtype::Float32);
    for (segments, expected) in [
        (&[][..], "have a first number but got none"),
        (&[1, 8], "start at 0 but got 1"),
        (&[-1, 8], "start at 0 but got -1"),
        (&[0, 5, 4, 8], "not fall but got Some([5, 4])"),
        (&[0, 4], "end at L = 8 but got 4"),
        (&[0, 9], "end at L = 8 but got 9"),
        (&[0], "end at L = 8 but got 0"),
    ] {
        let options = ScanOptions { axis: 1, segments: Some(segments), ..Default::default() };
        let expected = format!("_scan] segments must {expected}");
        assert_eq!(sum(&x, options), format!("[associative{expected}"));
        assert_eq!(affine(&x, &x, options), format!("[affine{expected}"));
    }
}

#[test]
fn a_backend_that_cannot_is_refused_in_words() {
    let x = normal(1, &[8], Dtype::Float32);
    let builtin = Dispatch::Only(Backend::Builtin);
    assert_eq!(
        affine(&x, &x, ScanOptions { dispatch: builtin, ..Default::default() }),
        "[affine_scan] backend builtin is unavailable: MLX has no affine scan"
    );
    assert_eq!(
        sum(&x, ScanOptions { dispatch: builtin, segments: Some(&[0, 8]), ..Default::default() }),
        "[associative_scan] backend builtin is unavailable: MLX's scans know no segments"
    );
}

#[test]
fn nothing_to_scan_leaves_the_state() {
    for shape in [&[0][..], &[2, 0, 3], &[0, 4], &[4, 0]] {
        let x = normal(1, shape, Dtype::Float16);
        for axis in 0..shape.len() {
            let rest = [&shape[..axis], &shape[axis + 1..]].concat();
            let state = normal(2, &rest, Dtype::Float32);
            let options = ScanOptions {
                axis: axis as i32,
                initial_state: Some(&state),
                ..Default::default()
            };
            let (y, last) = mlx_primitives::scan::affine_scan_with_state(&x, &x, options).unwrap();
            assert_eq!((y.shape(), y.dtype()), (shape, Dtype::Float16));
            assert!(last.all_close(&state, None, None, None).unwrap(), "{shape:?} along {axis}");
        }
    }
}

#[test]
fn segments_of_nothing_leave_their_states() {
    let x = normal(1, &[2, 0, 3], Dtype::Float32);
    for segments in [&[0][..], &[0, 0], &[0, 0, 0]] {
        let state = normal(2, &[2, segments.len() as i32 - 1, 3], Dtype::Float32);
        let options = ScanOptions {
            axis: 1,
            initial_state: Some(&state),
            segments: Some(segments),
            ..Default::default()
        };
        let (_, last) = mlx_primitives::scan::affine_scan_with_state(&x, &x, options).unwrap();
        assert_eq!(last.shape(), state.shape());
        assert!(last.all_close(&state, None, None, None).unwrap(), "{segments:?}");
    }
}

#[test]
fn more_rows_than_can_be_counted_are_an_error() {
    let one = Array::from_f32(1.0);
    for (shape, axis) in [([65536, 65536, 2], 2), ([65536, 65536, 0], 2), ([2, 65536, 65536], 0)] {
        let x = broadcast_to(&one, &shape).unwrap();
        let options = ScanOptions { axis, ..Default::default() };
        let error = associative_scan(&x, ScanOperator::Add, options).unwrap_err().to_string();
        assert!(error.contains("have fewer than 2^31 rows"), "{error}");
    }
}
