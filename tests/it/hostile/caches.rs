//! Caches of every kind, asked for odd things: an answer of the right shape, or a refusal that changes nothing.

use super::*;

const KINDS: [&str; 4] = ["simple", "sliding", "rotating", "compressed"];

fn some_cache(hostile: &mut Hostile) -> Option<Box<dyn Cache>> {
    let config = KvCacheConfig {
        max_len: hostile.or(None, &INTEGERS.map(Some)),
        window: hostile.or(3, &[0, 1, 2, -1, 64]),
        sinks: hostile.or(2, &[0, -1, 64]),
        undo: hostile.or(1, &[0, -1, 64]),
        keys: hostile.or(None, &[Some(KvForm::Int4), Some(KvForm::Fp8)]),
        values: hostile.or(None, &[Some(KvForm::Int8), Some(KvForm::Fp8)]),
        ..KvCacheConfig::new(1, 2, 32)
    };
    if hostile.0.below(4) == 0 {
        let padding = [0; 2].map(|_| hostile.or(1, &[0, -1, 7]));
        return BatchKvCache::new(&padding).ok().map(|cache| Box::new(cache) as Box<dyn Cache>);
    }
    match create_kv_cache(hostile.pick(&KINDS).parse().unwrap(), &config) {
        Ok(KvCaches::Layers(mut layers)) => layers.pop(),
        _ => None,
    }
}

pub(super) fn caches(hostile: &mut Hostile) {
    let Some(mut cache) = some_cache(hostile) else { return };
    let (layout, dtype) = (hostile.pick(&[Layout::Bshd, Layout::Bhsd]), hostile.pick(&FLOATING));
    let batch = hostile.or(2, &[0, 1]);
    for _ in 0..4 {
        let (held, tokens) = (cache.len(), hostile.pick(&[0, 1, 1, 2, 7]));
        let shape = |heads, size| match layout {
            Layout::Bshd => [batch, tokens, heads, size],
            Layout::Bhsd => [batch, heads, tokens, size],
        };
        let sizes = [hostile.or(32, &SIZES), hostile.or(32, &SIZES)];
        let queries = hostile.array(&shape(4, sizes[0]), dtype);
        let keys = hostile.array(&shape(2, sizes[0]), dtype);
        let values = hostile.array(&shape(2, sizes[1]), dtype);
        let mask = hostile.array(&[tokens, held + tokens], Bool);
        let left = hostile.maybe(held / 2 - 1);
        let options = FlashAttentionOptions {
            causal: hostile.pick(&[true, false]),
            mask: hostile.maybe(&mask),
            window: Window { left, right: None },
            scale: hostile.or(None, &NUMBERS.map(Some)),
            layout,
            ..Default::default()
        };
        match cache.attend(&queries, &keys, &values, options) {
            Ok(y) => {
                let expected = (keys.dim(0), values.dim(3), keys.dtype());
                assert_eq!((y.dim(0), y.dim(3), y.dtype()), expected);
                y.eval().unwrap();
                assert!(cache.len() >= held);
            }
            Err(Error::Mlx(error)) => panic!("left to MLX: {error}"),
            Err(error) => {
                assert!(error.to_string().starts_with('['), "{error}");
                assert_eq!(cache.len(), held, "{error}");
            }
        }
        let trimmed = hostile.pick(&[0, 0, 1, 2, -1, i32::MAX, i32::MIN]);
        assert_eq!(cache.can_trim(trimmed), cache.trim(trimmed).is_ok());
        assert!(cache.positions().iter().all(|&position| position < cache.len()));
    }
}
