//! Key-value caches. They know arrays, not models.

mod simple;

pub use simple::{SimpleKvCache, SimpleKvCacheOptions};
