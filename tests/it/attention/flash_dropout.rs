//! Weights left out by a key.

use mlx_primitives::{
    Backend, Dispatch,
    attention::{
        AttentionDropout, FlashAttentionOptions as Options, flash_attention,
        flash_attention_with_lse,
    },
};
use mlx_rs::{
    Array, Dtype,
    ops::{eye, repeat_axis},
    random,
};

use super::{
    asked::{Asked, segments},
    cases::{COMBINED, Case, Sizes, case},
    flash::OP,
};
use crate::support::{
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    tensor::Tensor,
};

const PROBABILITY: f32 = 0.3;

/// What each weight is multiplied by: with equal weights and the identity for values, the result is that over `S_kv`.
fn kept(sizes: Sizes, key: &Array) -> Tensor {
    let Sizes([batch, heads, _, queries, keys, ..]) = sizes;
    let zeros = |length| Array::zeros::<f32>(&[batch, length, heads, 4]).unwrap();
    let identity = eye::<f32>(keys, None, None).unwrap().reshape(&[1, keys, 1, keys]).unwrap();
    let values = repeat_axis::<f32>(identity, heads, 2).unwrap();
    let values = repeat_axis::<f32>(values, batch, 0).unwrap();
    let dropout = Some(AttentionDropout { probability: PROBABILITY, key });
    let options = Options { dropout, ..Default::default() };
    let y = flash_attention(zeros(queries), zeros(keys), values, options).unwrap();
    let y = Tensor::of(&y.swap_axes(1, 2).unwrap());
    Tensor::new(&y.shape, y.values.iter().map(|value| value * f64::from(keys)).collect())
}

#[test]
fn about_as_many_are_kept_as_was_asked() {
    let sizes = Sizes([2, 4, 4, 50, 50, 4, 50]);
    let kept = kept(sizes, &random::key(3).unwrap());
    let factor = 1.0 / (1.0 - f64::from(PROBABILITY));
    let (count, total) = (kept.values.iter().filter(|&&v| v > 0.0).count(), kept.values.len());
    for value in kept.values {
        assert!(value == 0.0 || (value - factor).abs() < 1e-5, "{value}");
    }
    let expected = total as f64 / factor;
    let deviation = (expected * f64::from(PROBABILITY)).sqrt();
    assert!((count as f64 - expected).abs() < 4.0 * deviation, "{count} of {total}");
}

/// One list of what is kept for all that is computed: results and gradients, with every other option, and the sum of
/// all weights.
#[test]
fn the_rest_is_as_if_weights_were_multiplied() {
    let key = random::key(7).unwrap();
    let plain = case("plain", [1, 4, 2, 3, 5, 4, 3]);
    let small = Case { sinks: Some(0.0), soft_cap: Some(0.8), causal: true, ..plain };
    let combined = COMBINED.iter().filter(|case| case.mask.is_none_or(|mask| mask.is_boolean()));
    for case in [plain, small].iter().chain(combined) {
        let (asked, segments) = (Asked::new(case, Dtype::Float32), segments(case));
        let kept = kept(case.sizes, &key);
        let dropout = Some(AttentionDropout { probability: PROBABILITY, key: &key });
        let (expected, sums) = asked.tensors().expected(case, Some(&kept));
        on_each_backend(
            OP,
            |dispatch| {
                let [queries, keys, values] = &asked.inputs;
                let options = Options { dropout, dispatch, ..asked.options(case, &segments) };
                flash_attention_with_lse(queries, keys, values, options)
            },
            |backend, (y, lse)| {
                let what = format!("dropout, {} on {backend}", case.name);
                assert_close(&what, &y, &expected, Tolerance::of("reference", Dtype::Float32));
                assert_close(&what, &lse, &sums, Tolerance::of("reference", Dtype::Float32));
            },
        );
    }
}

#[test]
fn gradients_are_of_the_weights_that_were_kept() {
    let key = random::key(11).unwrap();
    let dropout = Some(AttentionDropout { probability: PROBABILITY, key: &key });
    let case = Case { sinks: Some(0.0), causal: true, ..case("small", [1, 4, 2, 3, 5, 4, 3]) };
    let (asked, kept) = (Asked::new(&case, Dtype::Float32), kept(case.sizes, &key));
    let tensors = asked.tensors();
    assert_gradients(
        "dropout",
        &tensors.list(),
        |list| tensors.with(list).expected(&case, Some(&kept)).0,
        |list| {
            let asked = asked.with(list);
            let [queries, keys, values] = &asked.inputs;
            let options = Options { dropout, ..asked.options(&case, &None) };
            flash_attention(queries, keys, values, options)
        },
    );
}

#[test]
fn a_key_is_a_choice() {
    let sizes = Sizes([2, 4, 4, 6, 7, 4, 7]);
    let of = |seed| kept(sizes, &random::key(seed).unwrap());
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
}

#[test]
fn a_probability_of_zero_is_no_dropout() {
    let case = case("small", [1, 4, 2, 3, 5, 4, 3]);
    let (asked, key) = (Asked::new(&case, Dtype::Float32), random::key(1).unwrap());
    let dropout = Some(AttentionDropout { probability: 0.0, key: &key });
    on_each_backend(
        OP,
        |dispatch| {
            let [queries, keys, values] = &asked.inputs;
            let call = |dropout| {
                let options = Options { dropout, dispatch, ..Default::default() };
                flash_attention(queries, keys, values, options)
            };
            Ok([call(dropout)?, call(None)?])
        },
        |backend, [with, without]| {
            assert_close(&backend.to_string(), &with, &Tensor::of(&without), Tolerance::EXACT);
        },
    );
}

/// The mean over so many keys that its deviation is a hundredth of what one key may do.
#[test]
fn the_mean_is_that_without() {
    const KEYS: u64 = 2000;
    let case = case("small", [1, 2, 1, 3, 5, 4, 3]);
    let asked = Asked::new(&case, Dtype::Float32);
    let [queries, keys, values] = &asked.inputs;
    let dispatch = Dispatch::Only(Backend::Reference);
    let mut sums = [0.0; 2 * 3 * 3];
    for seed in 0..KEYS {
        let key = random::key(seed).unwrap();
        let dropout = Some(AttentionDropout { probability: PROBABILITY, key: &key });
        let options = Options { dropout, dispatch, ..Default::default() };
        let y = Tensor::of(&flash_attention(queries, keys, values, options).unwrap());
        sums.iter_mut().zip(y.values).for_each(|(sum, value)| *sum += value);
    }
    let (expected, _) = asked.tensors().expected(&case, None);
    for (sum, expected) in sums.iter().zip(expected.values) {
        let mean = sum / KEYS as f64;
        // A weight of one times a value of 3 deviates by 2; by the root of 2000 keys less, and four times that.
        assert!((mean - expected).abs() < 0.18, "{mean} for {expected}");
    }
}
