//! Attention, and what it needs from a cache.

pub mod flash;
mod kv_cache;

pub(crate) use flash::kernel::KERNELS as FLASH_KERNELS;

pub use flash::{
    AttentionDropout, FlashAttention, FlashAttentionBuilder, FlashAttentionInput,
    FlashAttentionOptions, Segments, Window, flash_attention, flash_attention_with_lse,
};
pub use kv_cache::KvCache;
