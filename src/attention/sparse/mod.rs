//! Exact attention over some of the keys, in time that grows with the keys seen.
//!
//! Keys and values are seen by the block: those that a block of queries sees are gathered, and nothing is computed for
//! the others.

mod bigbird;
mod block_sparse;
mod gather;
mod layout;
mod longformer;

pub use bigbird::{BigBirdAttentionOptions, bigbird_attention};
pub use block_sparse::{BlockSparseAttentionOptions, block_sparse_attention};
pub use layout::{BlockLayout, BlockPattern};
pub use longformer::{LongformerAttentionOptions, LongformerGlobal, longformer_attention};
