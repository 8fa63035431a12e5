//! What attention needs from a cache.

use std::fmt::Debug;

use mlx_rs::Array;

use super::flash::FlashAttentionOptions;
use crate::{
    error::Result,
    rope::{RopeOffset, RopeOptions, rope_qk},
};

/// The keys and values of the tokens seen so far, as an attention layer sees them.
///
/// The cache attends, rather than the layer, because only the cache knows where tokens lie, in which form, and which of them
/// it has dropped. Layers take any implementation; those of this crate are in [`crate::cache`].
pub trait KvCache: Debug {
    /// The position of the next token: one for all rows, or one for each.
    fn offset(&self) -> RopeOffset<'_>;

    /// Appends the keys and values of new tokens, and attends to every token that is held, these included.
    ///
    /// Query `i` has the position of the `i`-th new key. Causality, windows and distances count positions, whatever was
    /// dropped. A mask has a key for each position up to the last new one.
    ///
    /// # Shapes
    /// Those of [`flash_attention`](super::flash_attention) in the layout of the options, with as many queries as keys.
    ///
    /// # Errors
    /// When the arrays do not fit each other, what is held, or the options, or when the cache does not support an option.
    /// Nothing is changed then.
    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array>;

    /// Whether layers should call [`Self::attend_with_rope`] instead of applying RoPE to queries and keys themselves: because
    /// that is cheaper, or because all tokens must be rotated by the same op. Default: no.
    fn applies_rope(&self) -> bool {
        false
    }

    /// Applies RoPE to queries and keys, from [`Self::offset`] on, and then attends as [`Self::attend`] does. The layout is that
    /// of `options`; that of `rope` is ignored.
    ///
    /// # Shapes
    /// Those of [`Self::attend`].
    ///
    /// # Errors
    /// Those of [`Self::attend`] and of [`rope_qk`]. Nothing is changed then.
    fn attend_with_rope(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        rope: RopeOptions,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        let rope = RopeOptions { layout: options.layout, ..rope };
        let (queries, keys) = rope_qk(queries, keys, self.offset(), rope)?;
        self.attend(&queries, &keys, values, options)
    }
}

impl<C: KvCache + ?Sized> KvCache for Box<C> {
    fn offset(&self) -> RopeOffset<'_> {
        (**self).offset()
    }

    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        (**self).attend(queries, keys, values, options)
    }

    fn applies_rope(&self) -> bool {
        (**self).applies_rope()
    }

    fn attend_with_rope(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        rope: RopeOptions,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        (**self).attend_with_rope(queries, keys, values, rope, options)
    }
}
