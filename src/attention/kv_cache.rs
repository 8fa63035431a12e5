//! What attention needs from a cache.

use std::fmt::Debug;

use mlx_rs::Array;

use crate::{error::Result, layout::Layout};

/// The keys and values of the tokens seen so far, as an attention layer sees them.
///
/// Layers take any implementation; [`crate::cache`] has ours.
pub trait KvCache: Debug {
    /// How many tokens are held, which is the position of the next one.
    fn len(&self) -> i32;

    /// Whether no token is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the keys and values of new tokens and returns those of all tokens, in `layout`.
    ///
    /// # Shapes
    /// In [`Layout::Bshd`]; the other one alike:
    /// - `keys`: `[B, S, H_kv, D]`, `values`: `[B, S, H_kv, D_v]`
    /// - result: `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]`, with `S_kv` the new length
    ///
    /// # Errors
    /// When the arrays do not fit each other or what is held. Nothing is changed then.
    fn update(&mut self, keys: &Array, values: &Array, layout: Layout) -> Result<(Array, Array)>;
}
