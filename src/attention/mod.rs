//! Attention over queries, keys and values.
//!
//! | function | for |
//! |---|---|
//! | [`flash_attention`] | exact attention, with every mask and option; start here |
//! | [`flash_attention_with_lse`], [`merge_states`] | attention over parts of the keys, joined afterwards |
//! | [`sliding_window_attention`] | long sequences in which each query sees its neighbours: time and memory in proportion to the window |
//! | [`chunked_cross_attention`] | few queries over very many keys, a chunk of keys in memory at a time |
//! | [`fused_rope_attention`] | rotary embeddings and attention in one call |
//! | [`paged_attention`] | decoding many sequences whose keys and values are in blocks of one pool |
//! | [`linear`] | cost linear in the sequence, with a state to decode from: linear attention, Performer, cosFormer |
//! | [`sparse`] | chosen blocks only: block-sparse attention, Longformer, BigBird |
//! | [`bias`] | ALiBi and T5's relative positions |
//!
//! These functions and the modules beside them take queries, keys and values; modules with projections, which take a hidden state,
//! are in [`layers`](crate::layers). [`KvCache`] is what attention needs from a cache; [`cache`](crate::cache) has the caches.

pub mod bias;
pub mod chunked;
mod decode;
pub mod flash;
pub mod fused_rope;
mod heads;
mod kv_cache;
pub mod linear;
mod merge;
mod paged;
pub mod sliding_window;
pub mod sparse;

pub(crate) use decode::KERNELS as DECODE_KERNELS;
pub(crate) use flash::kernel::KERNELS as FLASH_KERNELS;
pub(crate) use heads::with_positive_scale;
pub(crate) use paged::{
    IN_PLACE_KERNELS, KERNELS as PAGED_KERNELS, in_place, paged_attention_in_order,
};

pub use bias::{
    AlibiBiasOptions, RelativePositionBias, RelativePositionBiasBuilder, RelativePositionBiasInput,
    RelativePositionBucketOptions, alibi_bias, alibi_slopes, relative_position_bucket,
};
pub use chunked::{
    ChunkedCrossAttention, ChunkedCrossAttentionBuilder, ChunkedCrossAttentionOptions,
    chunked_cross_attention,
};
pub use flash::{
    AttentionDropout, FlashAttention, FlashAttentionBuilder, FlashAttentionInput,
    FlashAttentionOptions, Segments, Window, flash_attention, flash_attention_with_lse,
};
pub use fused_rope::{
    FusedRopeAttention, FusedRopeAttentionBuilder, FusedRopeAttentionInput,
    FusedRopeAttentionOptions, fused_rope_attention,
};
pub use kv_cache::KvCache;
pub use linear::{
    CosFormerAttentionOptions, FeatureMap, LinearAttentionOptions, LinearAttentionState,
    PerformerAttentionOptions, cosformer_attention, cosformer_attention_with_state,
    linear_attention, linear_attention_with_state, orthogonal_features, performer_attention,
    performer_attention_with_state,
};
pub use merge::merge_states;
pub use paged::{BlockForm, PagedAttentionOptions, paged_attention, paged_attention_with_lse};
pub use sliding_window::{
    SlidingWindowAttention, SlidingWindowAttentionBuilder, SlidingWindowOptions,
    sliding_window_attention,
};
pub use sparse::{
    BigBirdAttentionOptions, BlockLayout, BlockPattern, BlockSparseAttentionOptions,
    LongformerAttentionOptions, LongformerGlobal, bigbird_attention, block_sparse_attention,
    longformer_attention,
};
