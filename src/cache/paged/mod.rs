//! Keys and values of many sequences in blocks of one pool.
//!
//! [`PagedPool`] knows which sequence has which blocks, and holds no array. A [`PagedStep`] is what one forward pass of
//! some sequences needs to know of it, made once and shared by all layers. [`PagedKv`] holds the keys and values of one
//! layer, and with a step it is a cache for that layer.
//!
//! A pass is: [`PagedPool::append`] the new tokens of each sequence, [`PagedPool::step`], the model over rows of one
//! token with [`PagedKv::layer`] as the cache of each layer, [`PagedPool::computed`].

mod attend;
mod blocks;
mod dense;
mod eviction;
mod held;
mod kv;
mod pool;
mod prefix;
mod sequence;
mod step;
#[cfg(test)]
mod tests;
mod tokens;
mod way;

pub use eviction::Eviction;
pub use kv::{PagedKv, PagedKvOptions, PagedLayer};
pub use pool::{PagedPool, PagedPoolOptions};
pub use sequence::SequenceId;
pub use step::PagedStep;
