//! Attention, and what it needs from a cache.

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
