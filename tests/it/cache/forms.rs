use mlx_primitives::{
    Layout,
    attention::{FlashAttentionOptions, KvCache},
    cache::{Cache, KvForm, SimpleKvCache, SimpleKvCacheOptions},
};
use mlx_rs::{Array, Dtype};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

fn cache(keys: KvForm, values: KvForm) -> SimpleKvCache {
    let options = SimpleKvCacheOptions { step: 4, keys, values, ..Default::default() };
    SimpleKvCache::with_options(options).unwrap()
}

/// How far each number may be from what it was, by the range of its group and by itself.
fn allowed(form: KvForm, x: &Tensor, dtype: Dtype) -> Vec<f64> {
    // Scales and biases are rounded to the dtype, and so is the result.
    let eps = match dtype {
        Dtype::Float32 => 1e-6,
        Dtype::Float16 => 1e-3,
        _ => 8e-3,
    };
    let size = *x.shape.last().unwrap();
    let group = if size.is_multiple_of(64) { 64 } else { 32 };
    let by_group = |levels: f64| -> Vec<f64> {
        let error = |group: &[f64]| {
            let most = group.iter().copied().fold(f64::MIN, f64::max);
            let least = group.iter().copied().fold(f64::MAX, f64::min);
            let step = (most - least) / levels;
            // The format moves an end of the range so that zero is a level: by up to a step.
            vec![step + eps * most.abs().max(least.abs()) * 4.0; group.len()]
        };
        x.values.chunks(group).flat_map(error).collect()
    };
    match form {
        KvForm::Plain => vec![0.0; x.values.len()],
        KvForm::Int8 => by_group(255.0),
        KvForm::Int4 => by_group(15.0),
        _ => {
            let error = |row: &[f64]| {
                let most = row.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                let each = move |x: &f64| x.abs() * (1.0 / 16.0 + eps) + most * 2_f64.powi(-18);
                row.iter().map(each).collect::<Vec<_>>()
            };
            x.rows().flat_map(error).collect()
        }
    }
}

#[test]
fn what_is_read_is_as_close_as_the_form_says() {
    for &form in KvForm::ALL {
        for (dtype, size) in FLOATING.into_iter().flat_map(|dtype| [(dtype, 64), (dtype, 96)]) {
            let mut cache = cache(form, KvForm::Plain);
            let x = normal(1, &[2, 7, 2, size], dtype);
            cache.update(&x, &x, Layout::Bshd).unwrap();
            let (keys, values) = cache.contents(Layout::Bshd).unwrap().unwrap();
            assert_eq!((keys.dtype(), keys.shape()), (dtype, x.shape()));
            assert_eq!(Tensor::of(&values), Tensor::of(&x));
            let (x, keys) = (Tensor::of(&x), Tensor::of(&keys));
            let allowed = allowed(form, &x, dtype);
            for (i, allowed) in allowed.iter().enumerate() {
                let off = (x.values[i] - keys.values[i]).abs();
                assert!(
                    off <= *allowed,
                    "{form:?} {dtype:?}: {} for {}",
                    keys.values[i],
                    x.values[i]
                );
            }
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    for &form in KvForm::ALL {
        let mut cache = cache(form, form);
        let x = Array::zeros::<f32>(&[1, 3, 1, 64]).unwrap();
        let (keys, values) = cache.update(&x, &x, Layout::Bshd).unwrap();
        assert_eq!((Tensor::of(&keys), Tensor::of(&values)), (Tensor::of(&x), Tensor::of(&x)));
    }
}

#[test]
fn fewer_bits_take_less_room_and_each_side_has_its_own() {
    let bytes = |keys, values| {
        let mut cache = cache(keys, values);
        let x = normal(1, &[1, 4, 2, 64], Dtype::Float16);
        cache.update(&x, &x, Layout::Bshd).unwrap();
        cache.nbytes() / (4 * 2)
    };
    assert_eq!(bytes(KvForm::Plain, KvForm::Plain), 2 * 128);
    assert_eq!(bytes(KvForm::Int8, KvForm::Int8), 2 * (64 + 4));
    assert_eq!(bytes(KvForm::Int8, KvForm::Int4), 64 + 4 + 32 + 4);
    assert_eq!(bytes(KvForm::Fp8, KvForm::Int4), 64 + 4 + 32 + 4);
}

#[test]
fn tokens_in_parts_are_tokens_at_once() {
    for &form in KvForm::ALL {
        let x = normal(1, &[1, 6, 2, 64], Dtype::Float32);
        let options = || FlashAttentionOptions { causal: true, ..Default::default() };
        let whole = Tensor::of(&cache(form, form).attend(&x, &x, &x, options()).unwrap());
        let mut cache = cache(form, form);
        let parts = mlx_rs::ops::split_at_indices(&x, &[1, 2, 5], 1).unwrap();
        let parts: Vec<_> =
            parts.iter().map(|x| cache.attend(x, x, x, options()).unwrap()).collect();
        let joined = mlx_rs::ops::concatenate(&parts, 1).unwrap();
        assert_close("in parts", &joined, &whole, Tolerance::of("flash_attention", Dtype::Float32));
    }
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let x = normal(1, &[1, 2, 2, 40], Dtype::Float32);
    let mut int8 = cache(KvForm::Int8, KvForm::Plain);
    assert_eq!(
        int8.update(&x, &x, Layout::Bshd).unwrap_err().to_string(),
        "[SimpleKvCache] keys must have heads of a multiple of 32 numbers to be integers but got 40"
    );
    let mut int4 = cache(KvForm::Fp8, KvForm::Int4);
    assert!(int4.update(&x, &x, Layout::Bshd).unwrap_err().to_string().contains("values must"));
    assert!(int8.is_empty() && int4.is_empty());
    cache(KvForm::Fp8, KvForm::Plain).update(&x, &x, Layout::Bshd).unwrap();
}

#[test]
fn no_tokens_are_none_in_every_form() {
    for &form in KvForm::ALL {
        let none = normal(1, &[1, 0, 2, 64], Dtype::Float16);
        let mut cache = cache(form, form);
        let (keys, _) = cache.update(&none, &none, Layout::Bshd).unwrap();
        assert_eq!((keys.shape(), keys.dtype()), (none.shape(), Dtype::Float16));
        keys.eval().unwrap();
        let one = normal(1, &[1, 1, 2, 64], Dtype::Float16);
        assert_eq!(cache.update(&one, &one, Layout::Bshd).unwrap().0.dim(1), 1);
    }
}
