//! Attention, and what it needs from a cache.

pub mod flash;
mod kv_cache;

pub use flash::{
    FlashAttention, FlashAttentionBuilder, FlashAttentionInput, FlashAttentionOptions,
    flash_attention,
};
pub use kv_cache::KvCache;
