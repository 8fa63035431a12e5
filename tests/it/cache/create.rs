use mlx_primitives::{
    attention::{BlockForm, FlashAttentionOptions},
    cache::{Eviction, KvCacheConfig, KvCacheKind, KvCaches, KvForm, create_kv_cache},
};
use mlx_rs::Dtype;

use crate::support::sample::normal;

fn created(kind: &str, config: &KvCacheConfig) -> KvCaches {
    create_kv_cache(kind.parse().unwrap(), config).unwrap()
}

#[test]
fn every_documented_kind_is_made_and_works() {
    let config =
        KvCacheConfig { window: 4, sinks: 2, max_len: Some(20), ..KvCacheConfig::new(3, 2, 64) };
    for (kind, positions, bytes) in [
        ("simple", 9, 20 * 2 * 2 * 64 * 2),
        ("sliding", 4, 4 * 2 * 2 * 64 * 2),
        ("rotating", 6, 6 * 2 * 2 * 64 * 2),
        ("compressed", 9, 20 * 2 * 2 * (64 + 4)),
        ("quantized", 9, 20 * 2 * 2 * (64 + 4)),
    ] {
        let KvCaches::Layers(mut layers) = created(kind, &config) else { panic!("{kind}") };
        assert_eq!(layers.len(), 3, "{kind}");
        let x = normal(1, &[1, 9, 2, 64], Dtype::Float16);
        for cache in &mut layers {
            // Each layer by itself: none is behind another.
            cache.attend(&x, &x, &x, FlashAttentionOptions::default()).unwrap();
            assert_eq!((cache.len(), cache.positions().len()), (9, positions), "{kind}");
            assert_eq!(cache.nbytes(), bytes, "{kind}");
        }
    }
}

#[test]
fn a_pool_keeps_to_its_budget() {
    let eviction = Eviction::Composite(vec![(Eviction::Lru, 1.0), (Eviction::Fifo, 0.5)]);
    let max_bytes = 1_000_000;
    let config =
        KvCacheConfig { max_bytes, eviction, block_size: 8, ..KvCacheConfig::new(3, 2, 64) };
    let KvCaches::Paged { mut pool, layers } = created("paged", &config) else { panic!("paged") };
    let bytes = layers.iter().map(|layer| layer.nbytes()).sum::<usize>();
    let block = 8 * 3 * 2 * 2 * 64 * 2;
    assert!(bytes <= max_bytes && bytes + block > max_bytes, "{bytes}");
    assert_eq!((pool.block_size(), (pool.available_blocks() + 1) * block), (8, bytes));
    let compact = KvCacheConfig {
        block_keys: BlockForm::Int8,
        block_values: BlockForm::Fp8,
        ..config.clone()
    };
    let KvCaches::Paged { pool: larger, layers } = created("paged", &compact) else {
        panic!("paged")
    };
    let [block, bytes] =
        [8 * 3 * 2 * 2 * (64 + 4), layers.iter().map(|layer| layer.nbytes()).sum()];
    assert!(bytes <= max_bytes && bytes + block > max_bytes, "{bytes}");
    assert_eq!((larger.available_blocks() + 1) * block, bytes);
    let id = pool.open(&[], b"").unwrap();
    let prompt = vec![1; 8 * (pool.available_blocks() + 1)];
    assert!(pool.append(id, &prompt).unwrap_err().to_string().contains("that can be given"));
}

#[test]
fn what_cannot_be_made_is_refused() {
    let unknown = "no such kind".parse::<KvCacheKind>().unwrap_err().to_string();
    assert_eq!(
        unknown,
        "[create_kv_cache] kind must be simple, sliding, rotating, compressed, quantized or paged \
         but got \"no such kind\""
    );
    let good = || KvCacheConfig::new(2, 2, 64);
    for (name, config) in [
        ("keys", KvCacheConfig { keys: Some(KvForm::Int8), ..good() }),
        ("values", KvCacheConfig { values: Some(KvForm::Int8), ..good() }),
    ] {
        assert_eq!(
            create_kv_cache(KvCacheKind::Paged, &config).unwrap_err().to_string(),
            format!(
                "[create_kv_cache] {name} must be as they come for blocks, which have block_keys and block_values, but got Int8"
            )
        );
    }
    for (kind, config) in [
        (KvCacheKind::Simple, KvCacheConfig::new(0, 2, 64)),
        (KvCacheKind::Simple, KvCacheConfig { max_len: Some(0), ..good() }),
        (KvCacheKind::Rotating, KvCacheConfig { sinks: -1, ..good() }),
        (KvCacheKind::Sliding, KvCacheConfig { window: 0, ..good() }),
        (KvCacheKind::Paged, KvCacheConfig { max_bytes: 1000, ..good() }),
        (KvCacheKind::Paged, KvCacheConfig { block_size: 0, ..good() }),
        (KvCacheKind::Paged, KvCacheConfig { dtype: Dtype::Int8, max_bytes: 1 << 20, ..good() }),
        (KvCacheKind::Paged, KvCacheConfig { eviction: Eviction::Composite(vec![]), ..good() }),
        (KvCacheKind::Paged, KvCacheConfig { num_kv_heads: -1, ..good() }),
    ] {
        let refusal = create_kv_cache(kind, &config).unwrap_err().to_string();
        assert!(refusal.starts_with('['), "{kind:?}: {refusal}");
    }
    // And not for a pool of as many blocks as there are bytes.
    let no_size = KvCacheConfig { head_dim: 0, ..good() };
    let refusal = create_kv_cache(KvCacheKind::Paged, &no_size).unwrap_err().to_string();
    assert_eq!(refusal, "[PagedKv] head_dim must be at least 1 but got 0");
}
