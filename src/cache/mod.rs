//! Key-value caches: what attention layers append to, and what may be asked of each kind.

mod contract;
mod simple;

pub use contract::Cache;
pub use simple::{SimpleKvCache, SimpleKvCacheOptions};
