use mlx_primitives::attention::*;
use mlx_rs::{
    Array, Dtype,
    random::{self, key},
};

use super::{
    linear_oracle::{Rule, average, dot},
    linear_support::{check_all, check_pieces, check_refusals, inputs, refusal, tensors, zeros},
    visible_oracle::attend_visible,
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "performer_attention";

type Options<'a> = PerformerAttentionOptions<'a>;

fn directions(count: i32, dims: i32) -> Array {
    normal(11, &[count, dims], Dtype::Float32)
}

/// `Σ_m exp(ω_m · (q' + k') − (|q'|² + |k'|²) / 2)`.
fn expected(inputs: [&Tensor; 3], directions: &Tensor, scale: f64, causal: bool) -> Tensor {
    average(inputs, Rule { causal, eps: 0.0 }, |query, key, _, _| {
        let scaled = |x: &[f64]| x.iter().map(|x| scale.sqrt() * x).collect::<Vec<_>>();
        let (q, k) = (scaled(query), scaled(key));
        let lengths = (dot(&q, &q) + dot(&k, &k)) / 2.0;
        directions.rows().map(|w| (dot(w, &q) + dot(w, &k) - lengths).exp()).sum()
    })
}

#[test]
fn it_matches_the_oracle() {
    for chunk_size in [4, 128] {
        check_all(
            OP,
            |inputs, causal| {
                let size = inputs[0].shape[3];
                let scale = 1.0 / (size as f64).sqrt();
                expected(inputs, &Tensor::of(&directions(12, size as i32)), scale, causal)
            },
            |inputs, layout, causal| {
                let features = directions(12, inputs[0].dim(3));
                let options = Options { causal, layout, chunk_size, ..Options::new(&features) };
                performer_attention(&inputs[0], &inputs[1], &inputs[2], options)
            },
        );
    }
}

#[test]
fn the_scale_and_half_precision_features_are_taken() {
    let inputs = inputs([1, 2, 2, 5, 6, 4, 4], Dtype::Float32);
    let features = directions(7, 4).as_dtype(Dtype::Bfloat16).unwrap();
    let expected = expected(tensors(&inputs).each_ref(), &Tensor::of(&features), 0.3, false);
    let options = Options { scale: Some(0.3), ..Options::new(&features) };
    let y = performer_attention(&inputs[0], &inputs[1], &inputs[2], options).unwrap();
    assert_close(OP, &y, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn rows_of_each_block_are_orthogonal_and_as_long_as_normal_ones() {
    for (count, dims) in [(1, 1), (3, 5), (16, 16), (40, 16), (256, 64)] {
        let features = Tensor::of(&orthogonal_features(key(3).unwrap(), count, dims).unwrap());
        assert_eq!(features.shape, [count as usize, dims as usize]);
        let rows: Vec<_> = features.rows().collect();
        for block in rows.chunks(dims as usize) {
            for (i, a) in block.iter().enumerate() {
                for b in &block[..i] {
                    let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
                    assert!(cosine.abs() < 1e-5, "{count} {dims}: {cosine}");
                }
            }
        }
    }
    let features = Tensor::of(&orthogonal_features(key(4).unwrap(), 1024, 16).unwrap());
    let squares: Vec<_> = features.rows().map(|row| dot(row, row)).collect();
    let mean = squares.iter().sum::<f64>() / 1024.0;
    let variance = squares.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 1024.0;
    // χ² of 16: mean 16, variance 32; of 1024 draws the mean deviates by 0.18, the variance by 1.9.
    assert!((mean - 16.0).abs() < 0.9, "{mean}");
    assert!((variance - 32.0).abs() < 10.0, "{variance}");
}

#[test]
fn directions_are_spread_over_the_sphere() {
    // The first coordinate of a row has mean 0 and variance 1, of whatever place in its block.
    let features = Tensor::of(&orthogonal_features(key(5).unwrap(), 4096, 4).unwrap());
    for (place, coordinate) in (0..4).flat_map(|p| (0..4).map(move |c| (p, c))) {
        let of_place: Vec<_> =
            features.rows().skip(place).step_by(4).map(|r| r[coordinate]).collect();
        let mean = of_place.iter().sum::<f64>() / 1024.0;
        let variance = of_place.iter().map(|x| x * x).sum::<f64>() / 1024.0;
        assert!(mean.abs() < 0.16, "{place} {coordinate}: mean {mean}");
        assert!((variance - 1.0).abs() < 0.25, "{place} {coordinate}: variance {variance}");
    }
}

#[test]
fn a_key_decides_and_the_global_state_does_not() {
    let draw = |seed| Tensor::of(&orthogonal_features(key(seed).unwrap(), 8, 4).unwrap());
    random::seed(1).unwrap();
    let first = draw(7);
    let global = Tensor::of(&random::normal::<f32>(&[4], None, None, None).unwrap());
    assert_eq!(first, draw(7));
    assert_ne!(first, draw(8));
    random::seed(1).unwrap();
    assert_eq!(global, Tensor::of(&random::normal::<f32>(&[4], None, None, None).unwrap()));
}

/// The root of the mean square of the difference to softmax attention, over eight draws of features.
fn error(count: i32, causal: bool) -> f64 {
    let mut inputs = inputs([1, 2, 2, 24, 24, 16, 8], Dtype::Float32);
    // Of length 1 after the scale: the variance of a weight grows with the exponential of the squared lengths.
    for array in &mut inputs[..2] {
        *array = array.multiply(Array::from_f32(0.5)).unwrap();
    }
    let exact = attend_visible(tensors(&inputs).each_ref(), None, |i, j| !causal || j <= i);
    let draws = (0..8).map(|seed| {
        let features = orthogonal_features(key(seed).unwrap(), count, 16).unwrap();
        let options = Options { causal, ..Options::new(&features) };
        let y = performer_attention(&inputs[0], &inputs[1], &inputs[2], options).unwrap();
        let y = Tensor::of(&y);
        let squares = y.values.iter().zip(&exact.values).map(|(y, e)| (y - e).powi(2));
        squares.sum::<f64>() / y.values.len() as f64
    });
    (draws.sum::<f64>() / 8.0).sqrt()
}

#[test]
fn more_features_are_closer_to_softmax() {
    for causal in [false, true] {
        let errors = [16, 128, 1024].map(|count| error(count, causal));
        // Eight times the features: about a third of the error.
        assert!(errors[1] < 0.6 * errors[0] && errors[2] < 0.6 * errors[1], "{errors:?}");
        assert!(errors[2] < 0.1, "{errors:?}");
    }
}

#[test]
fn long_queries_and_keys_stay_in_range() {
    let inputs = inputs([1, 1, 1, 6, 6, 4, 3], Dtype::Float32);
    let long = inputs[0].multiply(Array::from_f32(100.0)).unwrap();
    let features = directions(8, 4);
    for causal in [false, true] {
        let options = Options { causal, chunk_size: 1, ..Options::new(&features) };
        let y = performer_attention(&long, &long, &inputs[2], options).unwrap();
        let values = Tensor::of(&inputs[2]).values;
        let largest = values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let y = Tensor::of(&y).values;
        assert!(y.iter().all(|y| y.is_finite() && y.abs() <= largest + 1e-5), "{y:?}");
        assert!(y.chunks(3).all(|row| row.iter().any(|&y| y != 0.0)), "{y:?}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    let features = directions(6, 3);
    let of_features = Tensor::of(&features);
    for (shape, causal) in [([2, 2, 1, 3, 3, 3, 2], false), ([1, 2, 2, 4, 3, 3, 2], true)] {
        assert_gradients(
            OP,
            &tensors(&inputs(shape, Dtype::Float32)),
            |inputs| expected([&inputs[0], &inputs[1], &inputs[2]], &of_features, 0.5, causal),
            |inputs| {
                let options =
                    Options { causal, scale: Some(0.5), chunk_size: 2, ..Options::new(&features) };
                performer_attention(&inputs[0], &inputs[1], &inputs[2], options)
            },
        );
    }
}

#[test]
fn pieces_are_the_whole() {
    let features = directions(12, 8);
    let options = Options { causal: true, ..Options::new(&features) };
    for pieces in [&[5, 1, 1, 1][..], &[3, 4, 0, 2]] {
        check_pieces(
            OP,
            pieces,
            |[q, k, v]| performer_attention(q, k, v, options).unwrap(),
            |[q, k, v], state, _| {
                performer_attention_with_state(q, k, v, Options { state, ..options }).unwrap()
            },
        );
    }
}

#[test]
fn bad_arguments_are_named() {
    let features = directions(5, 8);
    check_refusals(OP, |[q, k, v]| performer_attention(q, k, v, Options::new(&features)));
    let x = zeros(&[2, 5, 4, 8]);
    let with = |options: Options| refusal(performer_attention(&x, &x, &x, options));
    for shape in [&[5, 7][..], &[8], &[1, 5, 8]] {
        assert_eq!(
            with(Options::new(&zeros(shape))),
            format!("[{OP}] features must have shape [M, 8] but got {shape:?}")
        );
    }
    assert_eq!(
        with(Options::new(&zeros(&[0, 8]))),
        format!("[{OP}] M must be at least 1 but got 0")
    );
    let ints = Array::zeros::<i32>(&[5, 8]).unwrap();
    assert!(with(Options::new(&ints)).starts_with(&format!("[{OP}] features must have dtype")));
    for scale in [0.0, -1.0, f32::NAN] {
        assert_eq!(
            with(Options { scale: Some(scale), ..Options::new(&features) }),
            format!("[{OP}] scale must be finite and above 0 but got {scale}")
        );
    }
    assert_eq!(
        with(Options { chunk_size: 0, ..Options::new(&features) }),
        format!("[{OP}] chunk_size must be at least 1 but got 0")
    );
    let options = LinearAttentionOptions::default();
    let (_, state) = linear_attention_with_state(&x, &x, &x, options).unwrap();
    assert_eq!(
        with(Options { state: Some(&state), ..Options::new(&features) }),
        format!("[{OP}] state.sums must have shape [2, 4, 5, 8] but got [2, 4, 8, 8]")
    );
}

#[test]
fn bad_sizes_of_features_are_named() {
    let call = |key: &Array, count, dims| refusal(orthogonal_features(key, count, dims));
    let form = "[orthogonal_features]";
    let good = key(1).unwrap();
    for count in [0, -1, i32::MAX] {
        let expected = format!("must be from 1 to 1048576 but got {count}");
        assert_eq!(call(&good, count, 4), format!("{form} num_features {expected}"));
        assert_eq!(call(&good, 4, count), format!("{form} dims {expected}"));
    }
    let bad = Array::zeros::<u32>(&[3]).unwrap();
    assert_eq!(call(&bad, 4, 4), format!("{form} key must have shape [2] but got [3]"));
    assert!(call(&zeros(&[2]), 4, 4).starts_with(&format!("{form} key must have dtype Uint32")));
}
