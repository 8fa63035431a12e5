//! What every kind of cache answers.

use std::fmt::Debug;

use mlx_rs::Array;

use super::Saved;
use crate::{attention::KvCache, check::Check, error::Result, layout::Layout};

/// A cache of one layer that holds one sequence, or equally long ones side by side: what may be asked of any kind.
///
/// Positions are kept apart from the slots where tokens lie. A cache that lets tokens go still counts them, so that a new
/// one gets the position that it has in its text.
pub trait Cache: KvCache + Debug + Send {
    /// How many tokens were appended and not taken back, those let go included: the position of the next one.
    fn len(&self) -> i32;

    /// Whether no token was appended.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The positions of the tokens that are held, in order.
    fn positions(&self) -> Vec<i32>;

    /// The size of all its arrays, in bytes, with the room that waits for tokens.
    fn nbytes(&self) -> usize;

    /// How many of the last tokens it can take back now.
    fn trimmable(&self) -> i32;

    /// Whether it can take back that many of the last tokens now.
    fn can_trim(&self, tokens: i32) -> bool {
        (0..=self.trimmable()).contains(&tokens)
    }

    /// Takes back the last tokens, as if they had never been appended.
    ///
    /// # Errors
    /// Where [`Self::can_trim`] says no. Nothing is changed then.
    fn trim(&mut self, tokens: i32) -> Result<()>;

    /// Whether it can be forked.
    fn can_fork(&self) -> bool {
        true
    }

    /// A second cache that holds the same and goes on by itself. Arrays are shared until one of the two writes.
    ///
    /// # Errors
    /// Where [`Self::can_fork`] says no.
    fn fork(&self) -> Result<Box<dyn Cache>>;

    /// Forgets every token and frees the arrays; the next tokens may have other shapes.
    fn clear(&mut self);

    /// All that it holds, to be written into a file by [`save_caches`](super::save_caches).
    ///
    /// # Errors
    /// When MLX fails, and for kinds that are not of this crate.
    fn saved(&self) -> Result<Saved> {
        Check::op("save_caches").known(None, "caches", "be of a kind of this crate", "another")
    }
}

/// Refuses what [`Cache::can_trim`] does.
pub(super) fn check_trim(check: Check, cache: &dyn Cache, tokens: i32) -> Result<()> {
    let expected = format_args!("be between 0 and {}", cache.trimmable());
    check.value(cache.can_trim(tokens), "tokens", expected, tokens)
}

/// There is a query beside each new key.
pub(super) fn check_queries(
    check: Check,
    queries: &Array,
    keys: &Array,
    layout: Layout,
) -> Result<()> {
    let [batch, tokens, ..] = layout.dims(keys);
    check.shape("queries", queries, &layout.axes(batch, tokens, "H", "D"))
}
