//! Modules with projections, which take a hidden state `[B, S, dims]`: what a decoder is stacked from.
//!
//! [`DecoderBlock`] is a pre-norm block of an [`Attention`] and a [`GatedFeedForward`]; [`TokenEmbedding`] is the embedding, also
//! used as the output layer. [`GroupedQueryAttention`] and [`MultiQueryAttention`] are [`Attention`] under their usual names,
//! [`LinearAttention`], [`PerformerAttention`], [`CosFormerAttention`], [`BlockSparseAttention`], [`BigBirdAttention`] and
//! [`LongformerAttention`] are the cheaper kinds. A [`Projection`] is a linear layer, dense or quantized.
//!
//! `prepare_for_inference` of the first two makes fewer operations of each token.

mod attention;
mod block_sparse_attention;
mod cosformer_attention;
mod decoder_block;
mod feed_forward;
mod grouped_query;
mod head_projections;
mod linear_attention;
mod longformer_attention;
mod performer_attention;
mod prepared;
mod projection;
mod token_embedding;
mod watched;

pub use attention::{Attention, AttentionBuilder, AttentionInput};
pub use block_sparse_attention::{
    BigBirdAttention, BigBirdAttentionBuilder, BlockSparseAttention, BlockSparseAttentionBuilder,
};
pub use cosformer_attention::{CosFormerAttention, CosFormerAttentionBuilder};
pub use decoder_block::{DecoderBlock, DecoderBlockBuilder};
pub use feed_forward::{GatedFeedForward, GatedFeedForwardBuilder};
pub use grouped_query::{
    GroupedQueryAttention, GroupedQueryAttentionBuilder, MultiQueryAttention,
    MultiQueryAttentionBuilder,
};
pub use head_projections::HeadProjections;
pub use linear_attention::{
    LinearAttention, LinearAttentionBuilder, LinearAttentionCache, LinearAttentionInput,
};
pub use longformer_attention::{
    LongformerAttention, LongformerAttentionBuilder, LongformerAttentionInput,
};
pub use performer_attention::{PerformerAttention, PerformerAttentionBuilder};
pub use projection::Projection;
pub use token_embedding::TokenEmbedding;
pub use watched::WatchedProjection;

/// Gives an enum of modules the parameters of whichever module it holds.
macro_rules! parameters_of_variants {
    ($module:ident { $($variant:ident),+ }) => {
        impl $module {
            fn inner(&self) -> &dyn mlx_rs::module::ModuleParameters {
                match self {
                    $(Self::$variant(module) => module,)+
                }
            }

            fn inner_mut(&mut self) -> &mut dyn mlx_rs::module::ModuleParameters {
                match self {
                    $(Self::$variant(module) => module,)+
                }
            }
        }

        $crate::layers::parameters_of_inner!($module);
    };
}
pub(crate) use parameters_of_variants;

/// Gives a struct the parameters of the module in one of its fields, under the same names.
macro_rules! parameters_of_field {
    ($module:ident, $field:ident) => {
        impl $module {
            fn inner(&self) -> &dyn mlx_rs::module::ModuleParameters {
                &self.$field
            }

            fn inner_mut(&mut self) -> &mut dyn mlx_rs::module::ModuleParameters {
                &mut self.$field
            }
        }

        $crate::layers::parameters_of_inner!($module);
    };
}
pub(crate) use parameters_of_field;

/// Gives a module the parameters of what its `inner` and `inner_mut` return, under the same names; they are lent for writing
/// by `$lent`, where that is not the same.
macro_rules! parameters_of_inner {
    ($module:ident) => {
        $crate::layers::parameters_of_inner!($module, inner_mut);
    };
    ($module:ident, $lent:ident) => {
        impl mlx_rs::module::ModuleParameters for $module {
            fn num_parameters(&self) -> usize {
                self.inner().num_parameters()
            }

            fn parameters(&self) -> mlx_rs::module::ModuleParamRef<'_> {
                self.inner().parameters()
            }

            fn parameters_mut(&mut self) -> mlx_rs::module::ModuleParamMut<'_> {
                self.$lent().parameters_mut()
            }

            fn trainable_parameters(&self) -> mlx_rs::module::ModuleParamRef<'_> {
                self.inner().trainable_parameters()
            }

            fn freeze_parameters(&mut self, recursive: bool) {
                self.inner_mut().freeze_parameters(recursive);
            }

            fn unfreeze_parameters(&mut self, recursive: bool) {
                self.inner_mut().unfreeze_parameters(recursive);
            }

            fn all_frozen(&self) -> Option<bool> {
                self.inner().all_frozen()
            }

            fn any_frozen(&self) -> Option<bool> {
                self.inner().any_frozen()
            }
        }
    };
}
pub(crate) use parameters_of_inner;
