use mlx_primitives::{
    Dispatch, Result,
    rope::{RopeOptions, RopeStyle, rope},
};
use mlx_rs::{Array, Dtype};

use super::OP;
use crate::support::{
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

/// Angles in f32 are off by 2e-5 at position 100, and elements are at most 4 or so.
const TOLERANCE: Tolerance = Tolerance { rtol: 1e-5, atol: 1e-4 };

/// The same at position 800, over the products of 64 elements.
const PRODUCT_TOLERANCE: Tolerance = Tolerance { rtol: 1e-5, atol: 5e-3 };

const SIZE: usize = 64;

#[test]
fn lengths_are_kept() {
    let x = normal(1, &[2, 9, 3, SIZE as i32], Dtype::Float32);
    let lengths = |x: &Array| {
        let x = Tensor::of(x);
        let length = |row: &[f64]| row.iter().map(|value| value * value).sum::<f64>().sqrt();
        Tensor::new(&x.shape[..3], x.rows().map(length).collect())
    };
    on_each_backend(
        OP,
        |dispatch| rope(&x, 1000, RopeOptions { dispatch, ..Default::default() }),
        |backend, y| {
            let got = lengths(&y).to_array(Dtype::Float32);
            let what = format!("lengths after {OP} on {backend}");
            assert_close(&what, &got, &lengths(&x), TOLERANCE);
        },
    );
}

#[test]
fn only_the_distance_between_query_and_key_counts() {
    let query = normal(1, &[1, 1, 1, SIZE as i32], Dtype::Float32);
    let key = normal(2, &[1, 1, 1, SIZE as i32], Dtype::Float32);
    let product = |at_query, at_key, options: RopeOptions| -> Result<Array> {
        let query = rope(&query, at_query, options.clone())?;
        Ok(query.multiply(rope(&key, at_key, options)?)?.sum(None)?)
    };
    for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
        let options = RopeOptions { style, ..Default::default() };
        let expected = Tensor::of(&product(5, 2, options.clone()).unwrap());
        let elsewhere = Tensor::of(&product(5, 3, options.clone()).unwrap());
        assert!((expected.values[0] - elsewhere.values[0]).abs() > 0.1, "distance counts");
        on_each_backend(
            OP,
            |dispatch| product(805, 802, RopeOptions { dispatch, ..options.clone() }),
            |backend, got| {
                let what = format!("<q, k> at a distance of 3 on {backend}");
                assert_close(&what, &got, &expected, PRODUCT_TOLERANCE);
            },
        );
    }
}

#[test]
fn styles_differ_by_a_permutation() {
    let x = Tensor::of(&normal(1, &[2, 5, 2, SIZE as i32], Dtype::Float32));
    let half_split_of = |element: usize| element / 2 + (element % 2) * SIZE / 2;
    let interleave = |x: &Tensor| {
        Tensor::from_fn(&x.shape, |at| x.at(&[at[0], at[1], at[2], half_split_of(at[3])]))
    };
    on_each_backend(
        OP,
        |dispatch| {
            let options = RopeOptions { dispatch, ..Default::default() };
            let y = rope(x.to_array(Dtype::Float32), 100, options)?;
            Ok(interleave(&Tensor::of(&y)).to_array(Dtype::Float32))
        },
        |backend, expected| {
            let style = RopeStyle::Interleaved;
            let dispatch = Dispatch::Only(backend);
            let options = RopeOptions { style, dispatch, ..Default::default() };
            let y = rope(interleave(&x).to_array(Dtype::Float32), 100, options).unwrap();
            let what = format!("{OP} interleaved on {backend}");
            assert_close(&what, &y, &Tensor::of(&expected), TOLERANCE);
        },
    );
}
