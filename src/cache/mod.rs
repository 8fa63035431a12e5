//! Key-value caches: what attention layers append to, and what may be asked of each kind.

mod contract;
mod paged;
mod simple;

pub use contract::Cache;
pub use paged::{
    Eviction, PagedKv, PagedKvOptions, PagedLayer, PagedPool, PagedPoolOptions, PagedStep,
    SequenceId,
};
pub use simple::{SimpleKvCache, SimpleKvCacheOptions};
