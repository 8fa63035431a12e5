//! Attention, and what it needs from a cache.

pub mod flash;
mod kv_cache;
pub mod bias;

pub(crate) use flash::kernel::KERNELS as FLASH_KERNELS;

pub use bias::{
    AlibiBiasOptions, RelativePositionBias, RelativePositionBiasBuilder, RelativePositionBiasInput,
    RelativePositionBucketOptions, alibi_bias, alibi_slopes, relative_position_bucket,
};
pub use flash::{
    AttentionDropout, FlashAttention, FlashAttentionBuilder, FlashAttentionInput,
    FlashAttentionOptions, Segments, Window, flash_attention, flash_attention_with_lse,
};
pub use kv_cache::KvCache;
