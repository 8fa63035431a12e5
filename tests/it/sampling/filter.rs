use mlx_primitives::{
    Result,
    sampling::{min_p, top_k, top_p},
};
use mlx_rs::{Array, Dtype};

use super::softmax;
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    sample::{Random, normal, strided},
    tensor::Tensor,
};

const NONE: f64 = f64::NEG_INFINITY;

/// Indices from the best to the worst; of equal ones the lowest first, NaN and −∞ last.
fn ranked(row: &[f64]) -> Vec<usize> {
    let score = |i: usize| if row[i].is_nan() { NONE } else { row[i] };
    let mut order: Vec<_> = (0..row.len()).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    order
}

/// The logits of `row` that `kept` names, and −∞ for the rest.
fn only(row: &[f64], kept: &[usize]) -> Vec<f64> {
    let value = |i: usize| if kept.contains(&i) && !row[i].is_nan() { row[i] } else { NONE };
    (0..row.len()).map(value).collect()
}

fn oracle_top_k(row: &[f64], k: usize) -> Vec<f64> {
    let order = ranked(row);
    only(row, &order[..k.min(row.len())])
}

fn oracle_top_p(row: &[f64], p: f64) -> Vec<f64> {
    let (order, probabilities) = (ranked(row), softmax(row));
    let mut reached = 0.0;
    let mut kept = Vec::new();
    for token in order {
        if kept.is_empty() || reached < p {
            kept.push(token);
            reached += probabilities[token];
        }
    }
    only(row, &kept)
}

fn oracle_min_p(row: &[f64], p: f64, min_keep: usize) -> Vec<f64> {
    let (order, probabilities) = (ranked(row), softmax(row));
    let best = probabilities[order[0]];
    let kept: Vec<_> = order
        .iter()
        .enumerate()
        .filter(|&(rank, &token)| rank < min_keep || probabilities[token] >= p * best)
        .map(|(_, &token)| token)
        .collect();
    only(row, &kept)
}

/// Random rows, rows full of ties, and rows with entries that may not be drawn.
fn logits(dtype: Dtype) -> Vec<Array> {
    let mut random = Random::new(5);
    let ties: Vec<_> = (0..4 * 33).map(|_| random.below(5) as f32).collect();
    let none = f32::NEG_INFINITY;
    let holes = [
        [none, 1.0, none, 1.0, 0.5, none],
        [f32::NAN, 1.0, 2.0, f32::NAN, 0.5, 1.0],
        [-1e4, 1e4, 9e3, -2e4, 9e3, 0.0],
        [0.0; 6],
    ];
    let arrays = [
        normal(1, &[7], Dtype::Float32),
        normal(2, &[1], Dtype::Float32),
        normal(3, &[2, 3, 65], Dtype::Float32),
        strided(&normal(4, &[3, 64], Dtype::Float32)),
        Array::from_slice(&ties, &[4, 33]),
        Array::from_slice(holes.as_flattened(), &[4, 6]),
    ];
    arrays.into_iter().map(|array| array.as_dtype(dtype).unwrap()).collect()
}

fn check(
    name: &str,
    filter: impl Fn(&Array) -> Result<Array>,
    oracle: impl Fn(&[f64]) -> Vec<f64>,
) {
    for dtype in FLOATING {
        for logits in logits(dtype) {
            let x = Tensor::of(&logits);
            let y = filter(&logits).unwrap();
            let expected = Tensor::new(&x.shape, x.rows().flat_map(&oracle).collect());
            assert_eq!(y.dtype(), dtype);
            let what = format!("{name} of {:?} {dtype:?}", x.shape);
            assert_close(&what, &y, &expected, Tolerance::EXACT);
        }
    }
}

#[test]
fn top_k_matches_the_oracle() {
    for k in [1, 2, 3, 5, 32, 64, 65, 66, i32::MAX] {
        let oracle = |row: &[f64]| oracle_top_k(row, k as usize);
        check(&format!("top {k}"), |logits| top_k(logits, k), oracle);
    }
}

#[test]
fn top_p_matches_the_oracle() {
    for p in [1e-9_f32, 0.1, 0.3, 0.5, 0.6, 0.9, 0.99, 0.999] {
        let oracle = |row: &[f64]| oracle_top_p(row, p.into());
        check(&format!("top p {p}"), |logits| top_p(logits, p), oracle);
    }
}

#[test]
fn min_p_matches_the_oracle() {
    for p in [1e-30_f32, 0.01, 0.1, 0.5, 0.9, 1.0] {
        for min_keep in [1, 2, 5] {
            let oracle = |row: &[f64]| oracle_min_p(row, p.into(), min_keep as usize);
            let name = format!("min p {p} keeping {min_keep}");
            check(&name, |logits| min_p(logits, p, min_keep), oracle);
        }
    }
}

#[test]
fn a_filter_that_is_off_changes_nothing() {
    let same = |y: Result<Array>, x: &Array| {
        assert_eq!(format!("{:?}", Tensor::of(&y.unwrap())), format!("{:?}", Tensor::of(x)));
    };
    for x in logits(Dtype::Float32) {
        same(top_k(&x, 0), &x);
        same(top_p(&x, 1.0), &x);
        same(min_p(&x, 0.0, 1), &x);
    }
}

#[test]
fn a_row_of_nothing_stays_one() {
    let none = Array::full::<f32>(&[2, 5], Array::from_f32(f32::NEG_INFINITY)).unwrap();
    let expected = Tensor::new(&[2, 5], vec![NONE; 10]);
    for y in [top_k(&none, 2), top_p(&none, 0.5), min_p(&none, 0.5, 1), min_p(&none, 0.5, 2)] {
        assert_eq!(Tensor::of(&y.unwrap()), expected);
    }
}

#[test]
fn the_infinite_beats_all() {
    let logits = Array::from_slice(&[1.0, f32::INFINITY, 3.0], &[3]);
    let expected = Tensor::new(&[3], vec![NONE, f64::INFINITY, NONE]);
    for y in [top_k(&logits, 1), top_p(&logits, 0.9), min_p(&logits, 0.1, 1)] {
        assert_eq!(Tensor::of(&y.unwrap()), expected);
    }
}

#[test]
fn no_rows_give_no_rows() {
    let logits = Array::zeros::<f32>(&[0, 5]).unwrap();
    for y in [top_k(&logits, 2), top_p(&logits, 0.5), min_p(&logits, 0.5, 1)] {
        assert_eq!(y.unwrap().shape(), [0, 5]);
    }
}

#[test]
fn a_long_flat_tail_is_not_rounded_away() {
    let size = 100_000;
    let logits = Array::zeros::<f32>(&[size]).unwrap();
    let p = 0.999_f32;
    let kept = Tensor::of(&top_p(&logits, p).unwrap());
    let count = kept.values.iter().filter(|v| v.is_finite()).count();
    assert_eq!(count as f64, (f64::from(size) * f64::from(p)).ceil());
    // One likely token, then a tail of which each alone vanishes beside it in f32.
    let mut values = vec![0.0_f32; size as usize];
    values[0] = 20.0;
    let kept = Tensor::of(&top_p(Array::from_slice(&values, &[size]), 0.9999).unwrap());
    let likely = 20.0_f64.exp();
    let total = likely + f64::from(size - 1);
    let expected = 1.0 + (0.9999 * total - likely).max(0.0).ceil();
    let count = kept.values.iter().filter(|v| v.is_finite()).count() as f64;
    assert!((count - expected).abs() <= 64.0, "kept {count}, not {expected}");
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 5], Dtype::Float32);
    let message = |result: Result<Array>| result.unwrap_err().to_string();
    assert_eq!(message(top_k(&x, -1)), "[top_k] k must be at least 0 but got -1");
    assert_eq!(message(top_p(&x, 0.0)), "[top_p] p must be above 0 and at most 1 but got 0");
    for p in [f32::NAN, -0.5, 1.5, f32::INFINITY] {
        assert!(message(top_p(&x, p)).contains("[top_p] p must"), "{p}");
        assert!(message(min_p(&x, p, 1)).contains("[min_p] p must be from 0 to 1"), "{p}");
    }
    assert!(message(min_p(&x, 0.5, 0)).contains("min_keep must be at least 1"));
    let ints = Array::zeros::<i32>(&[5]).unwrap();
    let empty = Array::zeros::<f32>(&[2, 0]).unwrap();
    let filters: [fn(&Array) -> Result<Array>; 3] =
        [|x| top_k(x, 1), |x| top_p(x, 0.5), |x| min_p(x, 0.5, 1)];
    for filter in filters {
        assert!(message(filter(&ints)).contains("logits must have dtype"));
        assert!(message(filter(&empty)).contains("logits must have shape"));
        assert!(message(filter(&Array::from_f32(1.0))).contains("logits must have shape"));
    }
}
