//! Attention, and what it needs from a cache.

mod kv_cache;

pub use kv_cache::KvCache;
