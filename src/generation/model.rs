//! What the engine asks of a model.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::{BlockForm, KvCache},
    cache::PagedKvOptions,
};

/// What a token of a model without caches stands for.
const BYTES_OF_NOTHING: usize = 256;

/// What one layer keeps of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKv {
    /// Key and value heads.
    pub num_kv_heads: i32,
    /// The size of a key.
    pub head_dim: i32,
    /// The size of a value; that of a key where there is none.
    pub value_dim: Option<i32>,
    /// Of keys and values as the layer makes them: f32, f16 or bf16.
    pub dtype: Dtype,
}

impl LayerKv {
    fn in_blocks(self, blocks: i32, block_size: i32, [keys, values]: BlockForms) -> PagedKvOptions {
        let Self { num_kv_heads, head_dim, value_dim, dtype } = self;
        PagedKvOptions {
            blocks,
            block_size,
            num_kv_heads,
            head_dim,
            value_dim,
            dtype,
            keys,
            values,
        }
    }
}

/// How blocks hold keys and values.
pub(super) type BlockForms = [BlockForm; 2];

/// A decoder that predicts the next token, as [`GenerationEngine`](super::GenerationEngine) runs it.
///
/// It keeps nothing of a text itself: what its layers have to remember is in the caches that it is handed. A token takes fewer
/// operations where its blocks are [prepared](crate::layers::DecoderBlock::prepare_for_inference), which a GPU's host feels.
pub trait CausalModel {
    /// `V`: there are the ids below it.
    fn vocabulary(&self) -> i32;

    /// What each of its layers keeps, in order.
    fn layers(&self) -> Vec<LayerKv>;

    /// What the last layer says of each token; each layer attends by its cache.
    ///
    /// # Shapes
    /// `[B, S]`, u32, to `[B, S, dims]`. The engine calls it with a row for each token of all sequences, `[T, 1]`, each at
    /// the position that its cache says ([`KvCache::offset`]); there may be rows of no sequence at the end, of any token, of
    /// which nothing is kept. A step that still runs may draw the tokens, where the engine
    /// [runs ahead](super::GenerationEngineOptions::run_ahead): to read them here waits for it. What a cache attends to has to
    /// be part of the result: a GPU writes the tokens on the way there.
    ///
    /// # Errors
    /// As the model has it. The requests whose tokens these were then fail with it.
    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception>;

    /// The logits of the next token: `[..., dims]` to `[..., V]`.
    ///
    /// # Errors
    /// As for [`Self::hidden`].
    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception>;
}

/// The sizes of the caches of all layers.
pub(super) fn kvs<M: CausalModel>(
    model: &M,
    blocks: i32,
    block_size: i32,
    forms: BlockForms,
) -> Vec<PagedKvOptions> {
    let layers = model.layers().into_iter();
    layers.map(|layer| layer.in_blocks(blocks, block_size, forms)).collect()
}

/// How many bytes a token takes in all layers, or stands for, so that a model without any has a pool of some size.
pub(super) fn token_bytes<M: CausalModel>(model: &M, forms: BlockForms) -> usize {
    let bytes: usize = kvs(model, 0, 0, forms).iter().map(PagedKvOptions::token_bytes).sum();
    if bytes == 0 { BYTES_OF_NOTHING } else { bytes }
}
