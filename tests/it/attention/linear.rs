use std::slice::from_ref;

use mlx_primitives::{Layout, Result, attention::*};
use mlx_rs::{
    Array, Dtype,
    ops::concatenate,
    transforms::{compile::compile, fallible_vjp},
};

use super::{
    linear_oracle::{Rule, average, dot},
    linear_support::{
        Inputs, check_all, check_pieces, check_refusals, inputs, refusal, tensors, zeros,
    },
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    tensor::Tensor,
};

const OP: &str = "linear_attention";

type Options<'a> = LinearAttentionOptions<'a>;

fn feature(map: FeatureMap, x: f64) -> f64 {
    match map {
        FeatureMap::EluPlusOne if x > 0.0 => x + 1.0,
        FeatureMap::EluPlusOne | FeatureMap::Exp => x.exp(),
        FeatureMap::Relu => x.max(0.0),
        other => panic!("{other:?}"),
    }
}

fn expected(map: FeatureMap, inputs: [&Tensor; 3], causal: bool, eps: f64) -> Tensor {
    let eps = if map == FeatureMap::Exp { 0.0 } else { eps };
    average(inputs, Rule { causal, eps }, |query, key, _, _| {
        let of = |x: &[f64]| x.iter().map(|&x| feature(map, x)).collect::<Vec<_>>();
        dot(&of(query), &of(key))
    })
}

fn call([q, k, v]: &Inputs, options: Options) -> Result<Array> {
    linear_attention(q, k, v, options)
}

#[test]
fn every_map_matches_the_oracle() {
    for &feature_map in FeatureMap::ALL {
        for chunk_size in [4, 128] {
            check_all(
                OP,
                |inputs, causal| expected(feature_map, inputs, causal, 1e-6),
                |inputs, layout, causal| {
                    let options =
                        Options { feature_map, causal, chunk_size, layout, ..Default::default() };
                    call(inputs, options)
                },
            );
        }
    }
}

#[test]
fn chunks_change_nothing() {
    let inputs = inputs([1, 2, 1, 37, 40, 8, 8], Dtype::Float32);
    for &feature_map in FeatureMap::ALL {
        let expected = expected(feature_map, tensors(&inputs).each_ref(), true, 1e-6);
        for chunk_size in [1, 2, 7, 36, 37, 38, i32::MAX] {
            let options = Options { feature_map, causal: true, chunk_size, ..Default::default() };
            let y = call(&inputs, options).unwrap();
            let what = format!("{feature_map:?} in chunks of {chunk_size}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
        }
    }
}

#[test]
fn both_agree_at_the_last_position() {
    let inputs = inputs([1, 2, 2, 9, 9, 8, 8], Dtype::Float32);
    let last = |causal| {
        let y = Tensor::of(&call(&inputs, Options { causal, ..Default::default() }).unwrap());
        let rest = y.values.len() - 16;
        Tensor::new(&[16], y.values[rest..].to_vec()).to_array(Dtype::Float32)
    };
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("last position", &last(true), &Tensor::of(&last(false)), tolerance);
}

#[test]
fn eps_is_added_to_the_weights() {
    let inputs = inputs([1, 2, 2, 5, 5, 4, 4], Dtype::Float32);
    for (&feature_map, eps) in FeatureMap::ALL.iter().flat_map(|map| [0.0, 3.0].map(|e| (map, e))) {
        let expected = expected(feature_map, tensors(&inputs).each_ref(), true, eps.into());
        let options = Options { feature_map, eps, causal: true, ..Default::default() };
        let y = call(&inputs, options).unwrap();
        assert_close("eps", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn weights_of_zero_give_zero() {
    let below = Array::full::<f32>(&[1, 4, 2, 8], Array::from_f32(-1.0)).unwrap();
    let ones = Array::ones::<f32>(&[1, 4, 2, 8]).unwrap();
    for (eps, causal) in [(0.0, true), (0.0, false), (1e-6, true)] {
        let options = Options { feature_map: FeatureMap::Relu, eps, causal, ..Default::default() };
        let y = linear_attention(&below, &ones, &ones, options).unwrap();
        assert!(Tensor::of(&y).values.iter().all(|&y| y == 0.0));
    }
}

#[test]
fn exponentials_stay_in_range() {
    let values = inputs([1, 1, 1, 6, 6, 2, 3], Dtype::Float32);
    let tensor = |scale: f64| {
        let of = Tensor::of(&values[0]).values;
        Tensor::new(&[1, 6, 1, 2], of.iter().map(|x| scale * x).collect())
    };
    for scale in [1e4, 30.0] {
        let far = tensor(scale).to_array(Dtype::Float32);
        // Powers of the exponents less the largest of the row, in f64.
        let expected = |causal| {
            let of = Tensor::of(&far);
            let peak = |q: &[f64], k: &[f64]| {
                q.iter().zip(k).map(|(q, k)| q + k).fold(f64::NEG_INFINITY, f64::max)
            };
            let rows: Vec<_> = of.values.chunks(2).collect();
            let peaks: Vec<_> = (0..6)
                .map(|i| {
                    let seen = if causal { i + 1 } else { 6 };
                    rows[..seen].iter().map(|k| peak(rows[i], k)).fold(f64::NEG_INFINITY, f64::max)
                })
                .collect();
            average([&of, &of, &Tensor::of(&values[2])], Rule { causal, eps: 0.0 }, |q, k, i, _| {
                q.iter().zip(k).map(|(q, k)| (q + k - peaks[i as usize]).exp()).sum()
            })
        };
        for (causal, chunk_size) in [(false, 128), (true, 1)] {
            let feature_map = FeatureMap::Exp;
            let options = Options { feature_map, causal, chunk_size, ..Default::default() };
            let y = linear_attention(&far, &far, &values[2], options).unwrap();
            // An exponent of 1e4 is off by 2^-11.
            let tolerance = Tolerance { rtol: 2e-3, atol: 2e-3 };
            assert_close(&format!("exponents of {scale}"), &y, &expected(causal), tolerance);
        }
    }
}

#[test]
fn pieces_are_the_whole() {
    for &feature_map in FeatureMap::ALL {
        for pieces in [&[5, 1, 1, 1][..], &[1, 1, 1], &[3, 4, 0, 2], &[0, 4]] {
            let options =
                Options { feature_map, causal: true, chunk_size: 2, ..Default::default() };
            check_pieces(
                OP,
                pieces,
                |inputs| call(inputs, Options { chunk_size: 128, ..options }).unwrap(),
                |[q, k, v], state, _| {
                    linear_attention_with_state(q, k, v, Options { state, ..options }).unwrap()
                },
            );
        }
    }
}

#[test]
fn a_state_is_the_sums() {
    let inputs = inputs([2, 4, 2, 5, 7, 3, 4], Dtype::Float16);
    let [q, k, v] = &inputs;
    let (_, state) = linear_attention_with_state(q, k, v, Options::default()).unwrap();
    let [_, keys, values] = tensors(&inputs);
    let of = |b, j, h, d| feature(FeatureMap::EluPlusOne, keys.at(&[b, j, h, d]));
    let sums = Tensor::from_fn(&[2, 2, 3, 4], |i| {
        (0..7).map(|j| of(i[0], j, i[1], i[2]) * values.at(&[i[0], j, i[1], i[3]])).sum()
    });
    let normalizer = Tensor::from_fn(&[2, 2, 3], |i| (0..7).map(|j| of(i[0], j, i[1], i[2])).sum());
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("sums", &state.sums, &sums, tolerance);
    assert_close("normalizer", &state.normalizer, &normalizer, tolerance);
    assert!(state.peaks.is_none());
}

/// Whatever is seen first is seen by all, causal or not.
#[test]
fn a_state_comes_before_every_query() {
    let first = inputs([1, 2, 2, 3, 4, 8, 5], Dtype::Float32);
    for rows in [2, 5, 9] {
        let then = inputs([1, 2, 2, rows, 5, 8, 5], Dtype::Float32);
        for (&feature_map, causal) in
            FeatureMap::ALL.iter().flat_map(|map| [true, false].map(|causal| (map, causal)))
        {
            let options = Options { feature_map, causal, ..Default::default() };
            let [q, k, v] = &first;
            let (_, state) = linear_attention_with_state(q, k, v, options).unwrap();
            let [q, k, v] = &then;
            let state = Some(&state);
            let (y, _) =
                linear_attention_with_state(q, k, v, Options { state, ..options }).unwrap();
            let join = |a: &Array, b: &Array| Tensor::of(&concatenate(&[a, b], 1).unwrap());
            let (keys, values) = (join(&first[1], k), join(&first[2], v));
            let expected = if rows <= 5 || !causal {
                expected(feature_map, [&Tensor::of(q), &keys, &values], causal, 1e-6)
            } else {
                // The first four see the state alone, as four queries at its end would.
                let late = expected(feature_map, [&Tensor::of(q), &keys, &values], true, 1e-6);
                let [queries, keys, values] = [q, &first[1], &first[2]].map(Tensor::of);
                let alone = expected(feature_map, [&queries, &keys, &values], false, 1e-6);
                let cut = 4 * 2 * 5;
                let all = [&alone.values[..cut], &late.values[cut..]].concat();
                Tensor::new(&late.shape, all)
            };
            let tolerance = Tolerance::of(OP, Dtype::Float32);
            assert_close(&format!("{rows} {feature_map:?} {causal}"), &y, &expected, tolerance);
        }
    }
}

fn check_gradients(map: FeatureMap, shape: [i32; 7], causal: bool) {
    assert_gradients(
        &format!("{OP} {map:?} {shape:?} {causal}"),
        &tensors(&inputs(shape, Dtype::Float32)),
        |inputs| expected(map, [&inputs[0], &inputs[1], &inputs[2]], causal, 1e-6),
        |inputs| {
            let options = Options { feature_map: map, causal, chunk_size: 2, ..Default::default() };
            linear_attention(&inputs[0], &inputs[1], &inputs[2], options)
        },
    );
}

#[test]
fn gradients_match_finite_differences() {
    for map in [FeatureMap::EluPlusOne, FeatureMap::Exp] {
        for causal in [false, true] {
            check_gradients(map, [2, 2, 1, 3, 3, 4, 3], causal);
            check_gradients(map, [1, 2, 2, 5, 3, 2, 3], causal);
            check_gradients(map, [1, 1, 1, 3, 5, 2, 3], causal);
        }
    }
    check_gradients(FeatureMap::Relu, [1, 2, 2, 5, 5, 6, 3], false);
}

#[test]
fn gradients_pass_through_a_state() {
    let shape = [1, 2, 1, 6, 6, 3, 2];
    for &feature_map in FeatureMap::ALL.iter().filter(|&&map| map != FeatureMap::Relu) {
        assert_gradients(
            "through a state",
            &tensors(&inputs(shape, Dtype::Float32)),
            |inputs| expected(feature_map, [&inputs[0], &inputs[1], &inputs[2]], true, 1e-6),
            |inputs| {
                let options = Options { feature_map, causal: true, ..Default::default() };
                let halves =
                    inputs.iter().map(|x| x.split_equal(2, 1)).collect::<Result<Vec<_>, _>>()?;
                let [q, k, v] = [0, 1, 2].map(|which| &halves[which]);
                let (first, state) = linear_attention_with_state(&q[0], &k[0], &v[0], options)?;
                let options = Options { state: Some(&state), ..options };
                let then = linear_attention(&q[1], &k[1], &v[1], options)?;
                Ok(concatenate(&[first, then], 1)?)
            },
        );
    }
}

/// Of one head: what the sums, the normalizer and the peaks of a state add to the sums over the keys.
#[test]
fn gradients_reach_a_state_that_was_given() {
    let mut all = tensors(&inputs([1, 1, 1, 3, 3, 2, 2], Dtype::Float32)).to_vec();
    all.push(Tensor::new(&[1, 1, 2, 2], vec![0.3, -0.7, 1.1, 0.4]));
    all.push(Tensor::new(&[1, 1, 2], vec![1.5, 0.8]));
    all.push(Tensor::new(&[1, 1, 2], vec![0.2, -0.3]));
    let oracle = |x: &[Tensor]| {
        Tensor::from_fn(&[1, 3, 1, 2], |index| {
            let (i, d) = (index[1], index[3]);
            let (mut sum, mut weight) = (0.0, 0.0);
            for m in 0..2 {
                let feature = (x[0].at(&[0, i, 0, m]) + x[5].at(&[0, 0, m])).exp();
                sum += feature * x[3].at(&[0, 0, m, d]);
                weight += feature * x[4].at(&[0, 0, m]);
                for j in 0..=i {
                    let of_pair = (x[0].at(&[0, i, 0, m]) + x[1].at(&[0, j, 0, m])).exp();
                    sum += of_pair * x[2].at(&[0, j, 0, d]);
                    weight += of_pair;
                }
            }
            sum / weight
        })
    };
    assert_gradients("a given state", &all, oracle, |x| {
        let [sums, normalizer, peaks] = [3, 4, 5].map(|which: usize| x[which].clone());
        let state = LinearAttentionState { sums, normalizer, peaks: Some(peaks) };
        let options = Options {
            feature_map: FeatureMap::Exp,
            causal: true,
            chunk_size: 2,
            state: Some(&state),
            ..Default::default()
        };
        linear_attention(&x[0], &x[1], &x[2], options)
    });
}

#[test]
fn large_inputs_have_finite_gradients() {
    let large = Array::full::<f32>(&[1, 3, 1, 2], Array::from_f32(200.0)).unwrap();
    for &feature_map in FeatureMap::ALL {
        let run = |inputs: &[Array]| -> mlx_rs::error::Result<Vec<Array>> {
            let options = Options { feature_map, causal: true, ..Default::default() };
            Ok(vec![linear_attention(&inputs[0], &inputs[0], &inputs[0], options)?])
        };
        let (_, gradient) = fallible_vjp(run, from_ref(&large), from_ref(&large)).unwrap();
        assert!(Tensor::of(&gradient[0]).values.iter().all(|g| g.is_finite()), "{feature_map:?}");
    }
}

#[test]
fn a_projection_that_is_zero_can_learn() {
    let rows = |values: &[f32]| Array::from_slice(values, &[1, 2, 1, 1]);
    let (queries, values) = (rows(&[0.0, 0.0]), rows(&[1.0, 3.0]));
    // Of elu(x) + 1 at 0 the slope is 1 from either side.
    let attend = |inputs: &[Array]| -> std::result::Result<Vec<Array>, mlx_rs::error::Exception> {
        let options = Options { eps: 0.0, ..Default::default() };
        Ok(vec![linear_attention(&queries, &inputs[0], &values, options)?])
    };
    let (_, slopes) = fallible_vjp(attend, &[rows(&[0.0, 0.0])], &[rows(&[1.0, 0.0])]).unwrap();
    // y = (φ₀ + 3 φ₁) / (φ₀ + φ₁) with φ = 1.
    assert_eq!(Tensor::of(&slopes[0]).values, [-0.5, 0.5]);
}

#[test]
fn what_is_no_number_is_not_hidden() {
    let nan = Array::from_slice(&[f32::NAN, 1.0], &[1, 2, 1, 1]);
    let one = Array::from_slice(&[1.0_f32, 1.0], &[1, 2, 1, 1]);
    for map in [FeatureMap::EluPlusOne, FeatureMap::Relu, FeatureMap::Exp] {
        let options = || Options { feature_map: map, ..Default::default() };
        let of_queries = linear_attention(&nan, &one, &one, options()).unwrap();
        assert!(Tensor::of(&of_queries).values[0].is_nan(), "{map:?}");
        let of_keys = linear_attention(&one, &nan, &one, options()).unwrap();
        assert!(Tensor::of(&of_keys).values.iter().all(|y| y.is_nan()), "{map:?}");
    }
}

#[test]
fn it_compiles() {
    let run = |inputs: &[Array]| -> mlx_rs::error::Result<Vec<Array>> {
        let options = Options { causal: true, ..Default::default() };
        Ok(vec![linear_attention(&inputs[0], &inputs[1], &inputs[2], options)?])
    };
    let inputs = inputs([1, 4, 2, 9, 9, 8, 8], Dtype::Float32);
    let expected = Tensor::of(&run(&inputs).unwrap()[0]);
    let got = compile(run, None)(&inputs[..]).unwrap();
    assert_close("compiled", &got[0], &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_arguments_are_named() {
    check_refusals(OP, |[q, k, v]| linear_attention(q, k, v, Options::default()));
    let x = zeros(&[2, 5, 4, 8]);
    let with = |options: Options| refusal(linear_attention(&x, &x, &x, options));
    for eps in [-1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(
            with(Options { eps, ..Default::default() }),
            format!("[{OP}] eps must be finite and at least 0 but got {eps}")
        );
    }
    for chunk_size in [0, -1, i32::MIN] {
        assert_eq!(
            with(Options { chunk_size, ..Default::default() }),
            format!("[{OP}] chunk_size must be at least 1 but got {chunk_size}")
        );
    }
    let keys = zeros(&[2, 4, 5, 9]);
    let queries = zeros(&[2, 4, 5, 8]);
    let options = Options { layout: Layout::Bhsd, ..Default::default() };
    assert_eq!(
        refusal(linear_attention(&queries, &keys, &keys, options)),
        format!("[{OP}] keys must have shape [2, H_kv, S_kv, 8] but got [2, 4, 5, 9]")
    );
}

#[test]
fn a_state_of_something_else_is_refused() {
    let x = zeros(&[2, 5, 4, 8]);
    let of = |options: Options| linear_attention_with_state(&x, &x, &x, options).unwrap().1;
    let state = of(Options::default());
    let with = |state: &LinearAttentionState, feature_map| {
        let options = Options { feature_map, state: Some(state), ..Default::default() };
        refusal(linear_attention(&x, &x, &x, options))
    };
    let plain = FeatureMap::EluPlusOne;
    let mut other = LinearAttentionState { sums: zeros(&[2, 4, 8, 7]), ..state.clone() };
    let form = format!("[{OP}] state.sums must have");
    assert_eq!(with(&other, plain), format!("{form} shape [2, 4, 8, 8] but got [2, 4, 8, 7]"));
    other.sums = state.sums.as_dtype(Dtype::Float16).unwrap();
    assert_eq!(with(&other, plain), format!("{form} dtype Float32 but got Float16"));
    other = LinearAttentionState { normalizer: zeros(&[2, 4, 1]), ..state.clone() };
    assert_eq!(
        with(&other, plain),
        format!("[{OP}] state.normalizer must have shape [2, 4, 8] but got [2, 4, 1]")
    );
    assert_eq!(
        with(&state, FeatureMap::Exp),
        format!("[{OP}] state.peaks must be there for exponential features but got none")
    );
    let exponential = of(Options { feature_map: FeatureMap::Exp, ..Default::default() });
    assert_eq!(
        with(&exponential, plain),
        format!("[{OP}] state.peaks must be absent for these features but got some")
    );
    other = LinearAttentionState { peaks: Some(zeros(&[2, 4])), ..exponential };
    assert_eq!(
        with(&other, FeatureMap::Exp),
        format!("[{OP}] state.peaks must have shape [2, 4, 8] but got [2, 4]")
    );
}
