use std::slice::from_ref;

use mlx_primitives::{
    Result,
    scan::{GenericScanOptions, ScanOptions, affine_scan, generic_scan},
};
use mlx_rs::{Array, Dtype};

use super::{
    affine::decays,
    oracle::{self, Ask},
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "generic_scan";

fn affine(first: &[Array], second: &[Array]) -> Result<Vec<Array>> {
    let [(a, x), (next_a, next_x)] = [(&first[0], &first[1]), (&second[0], &second[1])];
    Ok(vec![a.multiply(next_a)?, next_a.multiply(x)?.add(next_x)?])
}

/// Does not commute, and takes two axes.
fn product(first: &[Array], second: &[Array]) -> Result<Vec<Array>> {
    Ok(vec![second[0].matmul(&first[0])?])
}

#[test]
fn pairs_of_parts_match_the_oracle() {
    for (shape, axis) in [([2, 9, 3], 1), ([700, 1, 2], 0), ([3, 1, 50], 2), ([1, 1, 1], 1)] {
        for reverse in [false, true] {
            let (a, x) = (decays(1, &shape, Dtype::Float32), normal(2, &shape, Dtype::Float32));
            let ask = Ask { reverse, ..Ask::along(axis) };
            let [expected, _] = oracle::affine(&Tensor::of(&a), &Tensor::of(&x), None, ask);
            let options = GenericScanOptions { axis: axis as i32 - 3, reverse, segments: None };
            let scanned = generic_scan(&[a, x], affine, options).unwrap();
            let what = format!("{OP} of {shape:?} along {axis}, reverse: {reverse}");
            assert_close(&what, &scanned[1], &expected, Tolerance::of(OP, Dtype::Float32));
        }
    }
}

#[test]
fn segments_begin_anew() {
    let (a, x) = (decays(1, &[2, 300], Dtype::Float32), normal(2, &[2, 300], Dtype::Float32));
    let numbers = [0, 100, 100, 171, 300];
    for reverse in [false, true] {
        let ask = Ask { reverse, segments: Some(&numbers), ..Ask::along(1) };
        let [expected, _] = oracle::affine(&Tensor::of(&a), &Tensor::of(&x), None, ask);
        let options = GenericScanOptions { reverse, segments: Some(&numbers), axis: -1 };
        let scanned = generic_scan(&[a.clone(), x.clone()], affine, options).unwrap();
        assert_close(OP, &scanned[1], &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

/// Products of 2 × 2 matrices, beside an axis of batch.
fn products(x: &Tensor) -> Tensor {
    let mut y = x.clone();
    let at = |b: usize, t: usize, i: usize, j: usize| ((b * x.shape[1] + t) * 2 + i) * 2 + j;
    for b in 0..x.shape[0] {
        for t in 1..x.shape[1] {
            for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let terms = (0..2).map(|k| x.values[at(b, t, i, k)] * y.values[at(b, t - 1, k, j)]);
                y.values[at(b, t, i, j)] = terms.sum();
            }
        }
    }
    y
}

#[test]
fn an_operator_that_does_not_commute_keeps_the_order() {
    let options = GenericScanOptions { axis: 1, ..Default::default() };
    for length in [1, 2, 3, 7, 50] {
        let x = normal(1, &[3, length, 2, 2], Dtype::Float32);
        let x = x.multiply(Array::from_f32(0.7)).unwrap();
        let scanned = generic_scan(from_ref(&x), product, options).unwrap();
        let what = format!("{OP} of {length} matrices");
        assert_close(&what, &scanned[0], &products(&Tensor::of(&x)), Tolerance::LAYER);
    }
}

#[test]
fn gradients_match_finite_differences() {
    let x = Tensor::of(&normal(1, &[1, 6, 2, 2], Dtype::Float32));
    assert_gradients(
        OP,
        &[x],
        |inputs| products(&inputs[0]),
        |arrays| {
            let options = GenericScanOptions { axis: 1, ..Default::default() };
            Ok(generic_scan(arrays, product, options)?.remove(0))
        },
    );
}

#[test]
fn it_is_the_affine_scan_of_affine_steps() {
    let (a, x) = (decays(1, &[4, 77], Dtype::Float32), normal(2, &[4, 77], Dtype::Float32));
    let expected = affine_scan(&a, &x, ScanOptions::default()).unwrap();
    let scanned = generic_scan(&[a, x], affine, GenericScanOptions::default()).unwrap();
    assert_close(OP, &scanned[1], &Tensor::of(&expected), Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let (x, y) = (normal(1, &[2, 3], Dtype::Float32), normal(1, &[2, 4], Dtype::Float32));
    let call = |elements: &[Array], axis, combine: fn(&[Array], &[Array]) -> Result<Vec<Array>>| {
        let options = GenericScanOptions { axis, ..Default::default() };
        generic_scan(elements, combine, options).unwrap_err().to_string()
    };
    let keep = |first: &[Array], _: &[Array]| Ok(first.to_vec());
    assert_eq!(
        call(&[], 0, keep),
        "[generic_scan] elements must hold an array or more but got none"
    );
    assert_eq!(
        call(from_ref(&x), 2, keep),
        "[generic_scan] axis must be an axis of each array, which has 2 but got 2"
    );
    assert_eq!(
        call(&[x.clone(), y], 1, keep),
        "[generic_scan] axis must have the length 3 of the first in every array but got 4"
    );
    assert_eq!(
        call(from_ref(&x), 1, |_, _| Ok(Vec::new())),
        "[generic_scan] combine must return 1 arrays but got 0"
    );
    let wrong = |first: &[Array], _: &[Array]| Ok(vec![first[0].expand_dims(0)?]);
    assert_eq!(
        call(from_ref(&x), 1, wrong),
        "[generic_scan] result of combine must have shape [1, 2] but got [1, 1, 2]"
    );
    let options = GenericScanOptions { segments: Some(&[0, 4]), ..Default::default() };
    let refused = generic_scan(&[x], keep, options).unwrap_err().to_string();
    assert_eq!(refused, "[generic_scan] segments must end at L = 3 but got 4");
}

/// `[5, 0]` has nothing to scan, which is no reason to leave `[5, 3]` as it is.
#[test]
fn a_part_without_elements_leaves_the_others_scanned() {
    let x = normal(3, &[5, 3], Dtype::Float32);
    let nothing = Array::zeros::<f32>(&[5, 0]).unwrap();
    let sum = |first: &[Array], second: &[Array]| -> Result<Vec<Array>> {
        first.iter().zip(second).map(|(first, second)| Ok(first.add(second)?)).collect()
    };
    let options = GenericScanOptions { axis: 0, ..Default::default() };
    let scanned = generic_scan(&[x.clone(), nothing], sum, options).unwrap();
    let mut expected = Tensor::of(&x);
    for at in 3..15 {
        expected.values[at] += expected.values[at - 3];
    }
    assert_close(OP, &scanned[0], &expected, Tolerance::of(OP, Dtype::Float32));
    assert_eq!(scanned[1].shape(), [5, 0]);
}
