//! What a caller may ask for.

use mlx_rs::Array;

use crate::{check::Check, dispatch::Dispatch, error::Result, layout::Layout};

/// Options of [`flash_attention`](super::flash_attention), in the order in which they apply to scores.
///
/// All of them combine. Queries are aligned with the end of the keys: query `i` has the position of key `i + S_kv − S_q`, as
/// when the keys include a cache of earlier ones. `causal`, `window` and `alibi_slopes` count from that position.
#[derive(Debug, Clone, Default)]
pub struct FlashAttentionOptions<'a> {
    /// What the products of queries and keys are multiplied by: any finite number. Zero weighs all
    /// visible keys alike, and below zero the least similar weighs most. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Bends scores into `(−c, c)` by `c · tanh(score / c)`: finite and above zero. Default: none.
    pub soft_cap: Option<f32>,
    /// `[H]` or `[B, H]`, f32, f16 or bf16: `slope · |i + S_kv − S_q − j|` is taken from the score of query `i` and key `j`
    /// (Press et al., [ALiBi](https://arxiv.org/abs/2108.12409), 2021). Default: none.
    pub alibi_slopes: Option<&'a Array>,
    /// Which keys each query may see, on top of the other options: broadcastable to `[B, H, S_q, S_kv]`
    /// whatever the layout. Booleans are true where it may. Floats are added to the scores in the
    /// dtype of the queries; −32768 or less, so −∞ too, hides the key altogether.
    pub mask: Option<&'a Array>,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`. Default: no.
    pub causal: bool,
    /// How many keys before and after its own position a query sees. Default: all.
    pub window: Window,
    /// Packed sequences of several lengths in a batch of one: a query sees the keys of its own sequence only. Default: one
    /// sequence.
    pub segments: Option<Segments<'a>>,
    /// `[H]`, f32, f16 or bf16: the score of one more key in each head, which has no value: it is part of the softmax's
    /// denominator only (Xiao et al., [attention sinks](https://arxiv.org/abs/2309.17453), 2023). Default: none.
    pub sinks: Option<&'a Array>,
    /// Drops some of the weights. Default: none.
    pub dropout: Option<AttentionDropout<'a>>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// How many keys a query sees before and after the key at its own position, which it always sees; `None` for all.
///
/// Query `i` sees key `j` where `i + S_kv − S_q − left ≤ j ≤ i + S_kv − S_q + right`. `causal` is a `right` of 0, and
/// overrides a larger one. Models that count the query's own position, as Mistral does with `sliding_window`, and
/// [`RotatingKvCacheOptions::window`](crate::cache::RotatingKvCacheOptions::window) have a window of `left + 1`.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, Window};
///
/// // Each token sees itself and the 1023 before it.
/// let window = Window { left: Some(1023), right: None };
/// let options = FlashAttentionOptions { causal: true, window, ..Default::default() };
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Window {
    /// Keys before: 0 or more.
    pub left: Option<i32>,
    /// Keys after: 0 or more.
    pub right: Option<i32>,
}

impl Window {
    pub(super) fn check(self, check: Check) -> Result<()> {
        check.at_least("window.left", self.left.unwrap_or(0), 0)?;
        check.at_least("window.right", self.right.unwrap_or(0), 0)
    }
}

/// Where sequences of several lengths begin and end, laid one after another in a batch of one.
///
/// Sequence `n` has the queries `queries[n]..queries[n + 1]` and the keys `keys[n]..keys[n + 1]`; either may be none. The
/// offsets must not decrease, start at 0 and end at `S_q` and `S_kv`. Their values are not checked, because that would read
/// the arrays: with others the result is unspecified, but no memory outside the arrays is touched. A query in no sequence
/// sees no key. Inside a sequence its own lengths stand for `S_q` and `S_kv`.
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a> {
    /// `[N + 1]`, i32.
    pub queries: &'a Array,
    /// `[N + 1]`, i32.
    pub keys: &'a Array,
}

/// Drops each weight with some probability, and scales the others up so that the expected result stays the same.
///
/// Which weights are dropped depends on the key and the shape of the scores, not on the values. The log-sum-exp is that of all
/// weights.
#[derive(Debug, Clone, Copy)]
pub struct AttentionDropout<'a> {
    /// In `[0, 1)`.
    pub probability: f32,
    /// `[2]`, u32, of [`mlx_rs::random::key`].
    pub key: &'a Array,
}
