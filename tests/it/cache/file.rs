use std::collections::HashMap;

use mlx_primitives::{
    Layout,
    attention::{FlashAttentionOptions, KvCache},
    cache::{
        BatchKvCache, Cache, KvForm, RotatingKvCache, RotatingKvCacheOptions, SimpleKvCache,
        SimpleKvCacheOptions, load_caches, save_caches,
    },
};
use mlx_rs::{Array, Dtype};

use crate::support::{FLOATING, sample::normal, tensor::Tensor};

fn kinds(dtype: Dtype) -> Vec<Box<dyn Cache>> {
    let [keys, values] = [KvForm::Int8, KvForm::Fp8];
    let simple = SimpleKvCacheOptions { keys, values, max_len: Some(99), ..Default::default() };
    let rotating = RotatingKvCacheOptions {
        sinks: 2,
        undo: 1,
        keys,
        values,
        ..RotatingKvCacheOptions::new(5)
    };
    let mut caches: Vec<Box<dyn Cache>> = vec![
        Box::new(SimpleKvCache::new()),
        Box::new(SimpleKvCache::with_options(simple).unwrap()),
        Box::new(RotatingKvCache::with_options(rotating).unwrap()),
        Box::new(BatchKvCache::new(&[1, 0]).unwrap()),
    ];
    let x = normal(1, &[2, 9, 2, 32], dtype);
    for cache in &mut caches {
        cache.attend(&x, &x, &x, FlashAttentionOptions::default()).unwrap();
    }
    caches.push(Box::new(SimpleKvCache::new()));
    caches
}

#[test]
fn every_kind_goes_on_after_a_file_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("caches.safetensors");
    for dtype in FLOATING {
        let mut caches = kinds(dtype);
        let borrowed: Vec<&dyn Cache> = caches.iter().map(|cache| &**cache).collect();
        save_caches(&path, &borrowed, "a model").unwrap();
        let mut loaded = load_caches(&path, "a model").unwrap();
        assert_eq!(loaded.len(), caches.len());
        for (cache, loaded) in caches.iter_mut().zip(&mut loaded) {
            assert_eq!((cache.len(), cache.nbytes()), (loaded.len(), loaded.nbytes()));
            assert_eq!(cache.positions(), loaded.positions());
            assert_eq!(cache.trimmable(), loaded.trimmable());
            let x = normal(2, &[2, 2, 2, 32], dtype);
            let options = || FlashAttentionOptions { causal: true, ..Default::default() };
            let [a, b] = [cache, loaded].map(|cache| cache.attend(&x, &x, &x, options()).unwrap());
            assert_eq!(Tensor::of(&a), Tensor::of(&b));
        }
    }
}

#[test]
fn saving_touches_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("caches.safetensors");
    let beside = folder.path().join("caches.partial.safetensors");
    std::fs::write(&beside, "mine").unwrap();
    save_caches(&path, &[&SimpleKvCache::new()], "a model").unwrap();
    // A folder cannot be replaced by a file.
    let taken = folder.path().join("taken.safetensors");
    std::fs::create_dir(&taken).unwrap();
    save_caches(&taken, &[&SimpleKvCache::new()], "a model").unwrap_err();
    assert_eq!(std::fs::read_to_string(&beside).unwrap(), "mine");
    let left = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left = left.collect::<Vec<_>>();
    left.sort();
    assert_eq!(left, ["caches.partial.safetensors", "caches.safetensors", "taken.safetensors"]);
}

#[test]
fn files_of_something_else_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("caches.safetensors");
    let refusal = || load_caches(&path, "a model").unwrap_err().to_string();
    assert!(refusal().starts_with("[load_caches] path must be a safetensors file but got "));
    std::fs::write(&path, b"not a file of arrays").unwrap();
    assert!(refusal().starts_with("[load_caches] path must be a safetensors file but got "));

    let x = normal(1, &[1, 3, 2, 8], Dtype::Float32);
    Array::save_safetensors([("x", &x)], None, &path).unwrap();
    assert_eq!(refusal(), "[load_caches] format must be \"mlx-primitives caches 1\" but got none");
    let mut cache = SimpleKvCache::new();
    cache.update(&x, &x, Layout::Bshd).unwrap();
    save_caches(&path, &[&cache], "another model").unwrap();
    assert_eq!(refusal(), "[load_caches] model must be \"a model\" but got another model");
    let elsewhere = folder.path().join("no such folder").join("caches.safetensors");
    let unwritten = save_caches(elsewhere, &[&cache], "a model").unwrap_err().to_string();
    assert!(
        unwritten.starts_with("[save_caches] path must be a safetensors file that"),
        "{unwritten}"
    );
    assert!(save_caches(folder.path().join("caches.txt"), &[&cache], "a model").is_err());
}

#[test]
fn files_that_do_not_fit_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("caches.safetensors");
    let save = || {
        let caches = kinds(Dtype::Float32);
        let borrowed: Vec<&dyn Cache> = caches.iter().map(|cache| &**cache).collect();
        save_caches(&path, &borrowed, "a model").unwrap();
        Array::load_safetensors_with_metadata(&path).unwrap()
    };
    let refused = |arrays: HashMap<String, Array>, facts: HashMap<String, String>, what: &str| {
        let changed = folder.path().join("changed.safetensors");
        Array::save_safetensors(arrays, &facts, &changed).unwrap();
        let refusal = load_caches(&changed, "a model").unwrap_err().to_string();
        assert!(refusal.starts_with("[load_caches] "), "{what}: {refusal}");
    };
    for (name, fact) in [
        ("layers", "many"),
        ("layers", "9"),
        ("layers", "18446744073709551615"),
        ("layers.0.kind", "unheard of"),
        ("layers.0.len", "257"),
        ("layers.0.len", "-1"),
        ("layers.0.len", "99999999999"),
        ("layers.0.dtype", "Int32"),
        ("layers.0.key_size", "16"),
        ("layers.0.value_size", "-32"),
        ("layers.1.keys", "int4"),
        ("layers.1.values", "int9"),
        ("layers.2.window", "6"),
        ("layers.2.oldest", "99"),
        // Overwritten long ago.
        ("layers.2.oldest", "2"),
        ("layers.2.len", "-3"),
        ("layers.3.padding", "1"),
        ("layers.3.padding", "1 x"),
        ("layers.3.len", "300"),
    ] {
        let (arrays, mut facts) = save();
        assert!(facts.insert(name.to_owned(), fact.to_owned()).is_some(), "{name}");
        refused(arrays, facts, &format!("{name} = {fact}"));
    }
    for name in ["layers.0.1", "layers.1.4", "layers.2.0"] {
        let (mut arrays, facts) = save();
        assert!(arrays.remove(name).is_some(), "{name}");
        refused(arrays, facts, &format!("without {name}"));
        let (mut arrays, facts) = save();
        arrays.insert(name.to_owned(), normal(1, &[2, 2, 3], Dtype::Float32));
        refused(arrays, facts, &format!("another {name}"));
    }
}
