//! Key-value caches: what attention layers append to, and what may be asked of each kind.

mod batch;
mod contract;
mod file;
mod form;
mod mask;
mod paged;
mod ring;
mod rotating;
mod simple;
mod store;

pub use batch::BatchKvCache;
pub use contract::Cache;
pub use file::{Saved, load_caches, save_caches};
pub use form::KvForm;
pub use paged::{
    Eviction, PagedKv, PagedKvOptions, PagedLayer, PagedPool, PagedPoolOptions, PagedStep,
    SequenceId,
};
pub use rotating::{RotatingKvCache, RotatingKvCacheOptions};
pub use simple::{SimpleKvCache, SimpleKvCacheOptions};
