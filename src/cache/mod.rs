//! Key-value caches: what attention layers append to, and what may be asked of each kind.
//!
//! | kind | holds | in the forms of |
//! |---|---|---|
//! | [`SimpleKvCache`] | all tokens of one sequence, or of equally long ones | [`KvForm`] |
//! | [`RotatingKvCache`] | the last tokens and the first ones, likewise | [`KvForm`] |
//! | [`BatchKvCache`] | all tokens of sequences of several lengths | [`KvForm`] |
//! | [`PagedKv`], by a [`PagedPool`] | all tokens of many sequences in blocks that they share | [`BlockForm`](crate::attention::BlockForm) |
//!
//! Keys may be in one form and values in another.
//!
//! [`Cache`] is what can be asked of the first three, each of which is one layer's memory of its sequences; [`LayerCaches`] lists those
//! of a hybrid model, [`save_caches`] writes them to a file, and [`create_kv_cache`] makes them by name. The paged kind is a table
//! of sequences by layers instead, so the same questions have two addressees: the pool is asked for a sequence's length, to fork,
//! truncate or close it, and a [`PagedKv`] to attend, for its bytes, and for what it holds of a sequence.

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

pub use batch::{BatchKvCache, BatchKvCacheOptions};
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
