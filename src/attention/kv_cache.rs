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
/// The cache decides how new tokens attend, because only it knows where tokens lie, in which form, and which of them it
/// has let go. Layers take any implementation; [`crate::cache`] has ours.
pub trait KvCache: Debug {
    /// The position of the next token: one for all rows, or one for each.
    fn offset(&self) -> RopeOffset<'_>;

    /// Appends the keys and values of new tokens, and attends to every token that is held, these included.
    ///
    /// Queries stand beside the new keys, so causality, windows and distances count positions, whatever was let go. A mask
    /// has a key for each position up to the last new one.
    ///
    /// # Shapes
    /// Those of [`flash_attention`](super::flash_attention) in the layout of the options, with as many queries as keys.
    ///
    /// # Errors
    /// When the arrays do not fit each other, what is held or the options, or when an option is one that the cache cannot
    /// heed. Nothing is changed then.
    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array>;

    /// Whether layers leave it to [`Self::turn_and_attend`] to turn queries and keys, because it costs less there, or because all
    /// tokens are to turn by the same op. Default: no; a layer then turns them itself, both in one call.
    fn turns(&self) -> bool {
        false
    }

    /// [`Self::attend`] with queries and keys that are turned first as `rope` says, from [`Self::offset`] on. The layout is that
    /// of `options`, whatever that of `rope`.
    ///
    /// # Shapes
    /// Those of [`Self::attend`].
    ///
    /// # Errors
    /// Those of [`Self::attend`] and of [`rope_qk`]. Nothing is changed then.
    fn turn_and_attend(
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

    fn turns(&self) -> bool {
        (**self).turns()
    }

    fn turn_and_attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        rope: RopeOptions,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        (**self).turn_and_attend(queries, keys, values, rope, options)
    }
}
