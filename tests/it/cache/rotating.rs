use mlx_primitives::{
    Layout,
    attention::{FlashAttentionOptions, KvCache},
    cache::{Cache, KvForm, RotatingKvCache, RotatingKvCacheOptions},
};
use mlx_rs::{Array, Dtype};

use super::model::tokens;
use crate::support::{sample::normal, tensor::Tensor};

fn cache(window: i32, sinks: i32, undo: i32) -> RotatingKvCache {
    let options = RotatingKvCacheOptions { sinks, undo, ..RotatingKvCacheOptions::new(window) };
    RotatingKvCache::with_options(options).unwrap()
}

fn append(cache: &mut RotatingKvCache, count: i32) -> Array {
    let [q, k, v] = tokens(cache.len() as u64, 1, count, Layout::Bshd);
    let options = FlashAttentionOptions { causal: true, ..Default::default() };
    cache.attend(&q, &k, &v, options).unwrap()
}

#[test]
fn it_takes_the_room_of_its_window_and_no_more() {
    let mut cache = cache(6, 2, 1);
    append(&mut cache, 1);
    let room = cache.nbytes();
    assert_eq!(room, 9 * 2 * (8 + 5) * 4);
    append(&mut cache, 100);
    assert_eq!((cache.len(), cache.nbytes()), (101, room));
    assert_eq!(cache.positions(), [0, 1, 94, 95, 96, 97, 98, 99, 100]);
}

#[test]
fn as_many_tokens_as_asked_for_can_be_taken_back_after_it_went_round() {
    let mut cache = cache(6, 2, 4);
    append(&mut cache, 30);
    assert!(cache.can_trim(5) && !cache.can_trim(6));
    assert_eq!(
        cache.trim(6).unwrap_err().to_string(),
        "[RotatingKvCache] tokens must be between 0 and 5 but got 6"
    );
    cache.trim(5).unwrap();
    assert_eq!((cache.len(), cache.trimmable()), (25, 0));
    append(&mut cache, 2);
    assert_eq!(cache.trimmable(), 2);
}

#[test]
fn alibi_is_refused_once_there_is_a_gap() {
    let mut cache = cache(4, 2, 0);
    let slopes = normal(1, &[4], Dtype::Float32);
    let alibi = |cache: &mut RotatingKvCache| {
        let [q, k, v] = tokens(1, 1, 3, Layout::Bshd);
        let options = FlashAttentionOptions {
            causal: true,
            alibi_slopes: Some(&slopes),
            ..Default::default()
        };
        cache.attend(&q, &k, &v, options).map(drop)
    };
    alibi(&mut cache).unwrap();
    alibi(&mut cache).unwrap();
    append(&mut cache, 1);
    append(&mut cache, 1);
    assert_eq!(
        alibi(&mut cache).unwrap_err().to_string(),
        "[RotatingKvCache] alibi_slopes must be none once tokens between sinks and window are let \
         go but got some"
    );
    assert_eq!(cache.len(), 8);
}

#[test]
fn refusals_change_nothing() {
    let mut cache = cache(4, 1, 0);
    append(&mut cache, 7);
    let [q, k, v] = tokens(9, 1, 2, Layout::Bshd);
    let mask = Array::from_slice(&[true; 5], &[5]);
    let with_mask = FlashAttentionOptions { mask: Some(&mask), ..Default::default() };
    let [other, ..] = tokens(9, 1, 1, Layout::Bshd);
    let none = FlashAttentionOptions::default;
    for (arrays, options, expected) in [
        ([&q, &k, &v], with_mask, "mask must have shape broadcastable to [1, 4, 2, 9]"),
        ([&other, &k, &v], none(), "queries must have shape [1, 2, H, D]"),
        ([&q, &q, &v], none(), "values must have shape [1, 2, 4, D_v]"),
        ([&q, &v, &v], none(), "keys must have shape [1, S, 2, 8]"),
    ] {
        let before = cache.positions();
        let [q, k, v] = arrays;
        let refusal = cache.attend(q, k, v, options).unwrap_err().to_string();
        assert!(refusal.starts_with(&format!("[RotatingKvCache] {expected}")), "{refusal}");
        assert_eq!((cache.len(), cache.positions()), (7, before));
    }
    for options in [
        RotatingKvCacheOptions::new(0),
        RotatingKvCacheOptions { sinks: -1, ..RotatingKvCacheOptions::new(1) },
        RotatingKvCacheOptions { undo: -1, ..RotatingKvCacheOptions::new(1) },
        RotatingKvCacheOptions { undo: 1, ..RotatingKvCacheOptions::new(i32::MAX) },
    ] {
        assert!(RotatingKvCache::with_options(options).is_err());
    }
}

#[test]
fn integers_rotate_as_well() {
    for (keys, values) in [(KvForm::Int8, KvForm::Int4), (KvForm::Fp8, KvForm::Int8)] {
        let options = RotatingKvCacheOptions {
            sinks: 2,
            undo: 1,
            keys,
            values,
            ..RotatingKvCacheOptions::new(9)
        };
        let mut cache = RotatingKvCache::with_options(options).unwrap();
        let plain = RotatingKvCacheOptions { sinks: 2, undo: 1, ..RotatingKvCacheOptions::new(9) };
        let mut plain = RotatingKvCache::with_options(plain).unwrap();
        for (turn, count) in [12, 1, 1, 5, 1, 1, 1].into_iter().enumerate() {
            let x = normal(turn as u64, &[1, count, 2, 64], Dtype::Float32);
            let options = || FlashAttentionOptions { causal: true, ..Default::default() };
            let y = Tensor::of(&cache.attend(&x, &x, &x, options()).unwrap());
            let exact = Tensor::of(&plain.attend(&x, &x, &x, options()).unwrap());
            let off = y.values.iter().zip(&exact.values).map(|(a, b)| (a - b).abs());
            let (off, worst) =
                (off.clone().sum::<f64>() / y.values.len() as f64, off.fold(0.0, f64::max));
            // A sixteenth of a range of some 5 at most, for 4 bits.
            assert!(off < 0.1 && worst < 0.5, "{keys:?} {values:?}: {off} {worst}");
            assert!(off > 0.0);
        }
        assert!(cache.nbytes() * 2 < plain.nbytes(), "{} {}", cache.nbytes(), plain.nbytes());
    }
}
