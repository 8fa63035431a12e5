//! Layers made of operations: everything a decoder is stacked from.

mod attention;
mod decoder_block;
mod feed_forward;
mod projection;
mod token_embedding;

pub use attention::{Attention, AttentionBuilder, AttentionInput};
pub use decoder_block::{DecoderBlock, DecoderBlockBuilder};
pub use feed_forward::{GatedFeedForward, GatedFeedForwardBuilder};
pub use projection::Projection;
pub use token_embedding::TokenEmbedding;

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

        impl mlx_rs::module::ModuleParameters for $module {
            fn num_parameters(&self) -> usize {
                self.inner().num_parameters()
            }

            fn parameters(&self) -> mlx_rs::module::ModuleParamRef<'_> {
                self.inner().parameters()
            }

            fn parameters_mut(&mut self) -> mlx_rs::module::ModuleParamMut<'_> {
                self.inner_mut().parameters_mut()
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
pub(crate) use parameters_of_variants;
