//! Key-value caches: what attention layers append to, and what may be asked of each kind.

mod batch;
mod contract;
mod create;
mod file;
mod form;
mod hybrid;
mod mask;
mod paged;
mod ring;
mod rotating;
mod simple;
mod store;

pub use batch::BatchKvCache;
pub use contract::Cache;
pub use create::{KvCacheConfig, KvCacheKind, KvCaches, create_kv_cache};
pub use file::{Saved, load_caches, save_caches};
pub use form::KvForm;
pub use hybrid::{Checkpoint, LayerCache, LayerCaches};
pub use paged::{
    Eviction, PagedKv, PagedKvOptions, PagedLayer, PagedPool, PagedPoolOptions, PagedStep,
    SequenceId,
};
pub use rotating::{RotatingKvCache, RotatingKvCacheOptions};
pub use simple::{SimpleKvCache, SimpleKvCacheOptions};
