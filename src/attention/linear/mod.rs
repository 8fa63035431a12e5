//! Attention in time and memory linear in the length: weights that are products of features.
//!
//! Where the weight of a key is `φ(q) · φ(k)`, the sums over the keys do not depend on the query: `Σ φ(k) vᵀ`, of size
//! `[D, D_v]`, and `Σ φ(k)` are all there is to know of any number of keys. The functions differ in their features.

mod cosformer;
mod function;
mod performer;
mod running;
mod state;

pub use cosformer::{
    CosFormerAttentionOptions, cosformer_attention, cosformer_attention_with_state,
};
pub use function::{
    FeatureMap, LinearAttentionOptions, linear_attention, linear_attention_with_state,
};
pub use performer::{
    PerformerAttentionOptions, orthogonal_features, performer_attention,
    performer_attention_with_state,
};
pub use state::LinearAttentionState;
