//! A window, and tokens that see and are seen by all.

use mlx_rs::{Array, ops::concatenate};

use super::{
    block_sparse::{is_empty, nothing},
    gather::{Gather, Hides},
    layout::Blocks,
};
use crate::{
    attention::{FlashAttentionOptions, flash_attention, heads::Heads},
    check::Check,
    error::Result,
    layout::Layout,
};

/// Options of [`longformer_attention`].
#[derive(Debug, Clone, Copy)]
pub struct LongformerAttentionOptions<'a> {
    /// How many tokens to each side a token sees, from 0; the paper's window is twice that. Default: 256.
    pub window: i32,
    /// The tokens that see all and are seen by all, by their positions in any order. Default: none.
    pub global_tokens: &'a [i32],
    /// What global tokens compare and average with where that differs, as in the paper. Default: what the others do.
    pub global: Option<LongformerGlobal<'a>>,
    /// What the products of queries and keys are multiplied by: any finite number. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl LongformerAttentionOptions<'_> {
    /// The default of [`LongformerAttentionOptions::window`].
    pub const DEFAULT_WINDOW: i32 = 256;
}

impl Default for LongformerAttentionOptions<'_> {
    fn default() -> Self {
        Self {
            window: Self::DEFAULT_WINDOW,
            global_tokens: &[],
            global: None,
            scale: None,
            layout: Layout::default(),
        }
    }
}

/// Projections for the attention of the global tokens: their queries, and the keys and values of all tokens that they
/// see. Of the layout and the dtype of the other three.
#[derive(Debug, Clone, Copy)]
pub struct LongformerGlobal<'a> {
    /// `[B, G, H, D]`: one for each of the global tokens, in their order.
    pub queries: &'a Array,
    /// `[B, S, H_kv, D]`.
    pub keys: &'a Array,
    /// `[B, S, H_kv, D_v]`.
    pub values: &'a Array,
}

/// Attention of each token to a window around it and to the global tokens, and of these to all.
///
/// `y_i = Σ_j softmax_j(scale · q_i · k_j) v_j` over the tokens `j` with `|i − j| ≤ window` and the global ones; for a
/// global token `i` over all tokens, with the `q`, `k` and `v` of [`LongformerAttentionOptions::global`] if there are
/// any.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`
/// - `values`: `[B, S, H_kv, D_v]`, the same dtype
/// - result: `[B, S, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when `H` is not a multiple
/// of `H_kv`, when the dtypes differ or are not floating point, when the scale is not finite, when the window is
/// negative, or when a global token is not in `0..S`.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{LongformerAttentionOptions, longformer_attention};
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let options =
///     LongformerAttentionOptions { window: 32, global_tokens: &[0], ..Default::default() };
/// assert!(longformer_attention(&x, &x, &x, options)?.all_close(&x, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Blocks of queries go to [`flash_attention`](crate::attention::flash_attention) with the blocks of keys around them and
/// the global keys: time and memory grow as `S` times `2 · window + block + G` for `G` global tokens, and these cost
/// `G · S` more.
///
/// Beltagy et al., [Longformer: The Long-Document Transformer](https://arxiv.org/abs/2004.05150), 2020.
pub fn longformer_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: LongformerAttentionOptions<'_>,
) -> Result<Array> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let problem = Problem::new(arrays, options)?;
    if is_empty(&problem.heads) {
        return nothing(&problem.heads, options.layout);
    }
    let attended = problem.with_global_rows(problem.near()?)?;
    Ok(options.layout.swap_with_bhsd(&attended.swap_axes(1, 2)?)?)
}

/// A checked call.
struct Problem<'a> {
    arrays: [&'a Array; 3],
    heads: Heads,
    /// The global tokens, sorted, none twice.
    tokens: Vec<i32>,
    options: LongformerAttentionOptions<'a>,
}

impl<'a> Problem<'a> {
    fn new(arrays: [&'a Array; 3], options: LongformerAttentionOptions<'a>) -> Result<Self> {
        let check = Check::op("longformer_attention");
        let heads = Heads::new(check, arrays, options.layout)?;
        let Heads { batch, query_length, kv_heads, size, .. } = heads;
        let as_long = options.layout.axes(batch, query_length, kv_heads, size);
        check.shape("keys", arrays[1], &as_long)?;
        if let Some(global) = options.global {
            check_global(check, &heads, &options, global)?;
        }
        check.at_least("window", options.window, 0)?;
        check.finite("scale", options.scale.unwrap_or(1.0))?;
        for &token in options.global_tokens {
            let expected = format_args!("be from 0 to below {query_length}");
            check.value((0..query_length).contains(&token), "global_tokens", expected, token)?;
        }
        let mut tokens = options.global_tokens.to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        Ok(Self { arrays, heads, tokens, options })
    }

    /// `[B, S, H, D]` of one of the caller's arrays.
    fn bshd(&self, array: &Array) -> Result<Array> {
        Ok(self.options.layout.swap_with_bhsd(array)?.swap_axes(1, 2)?)
    }

    /// Every token as if it were not global: `[B, S, H, D_v]`.
    fn near(&self) -> Result<Array> {
        let length = self.heads.query_length;
        let window = self.options.window.min(length);
        let blocks =
            Blocks { block_size: window.clamp(16, 64), query_length: length, key_length: length };
        let [queries, keys, values] = self.arrays;
        let gather = Gather {
            queries: self.bshd(queries)?,
            keys: self.bshd(keys)?,
            values: self.bshd(values)?,
            heads: self.heads,
            blocks,
            rows: &rows(window, blocks),
            scale: self.options.scale,
            hides: Hides::Far { window, elsewhere: &self.tokens },
        };
        gather.attend()
    }

    /// Puts the global tokens' own results in their places.
    fn with_global_rows(&self, near: Array) -> Result<Array> {
        let LongformerAttentionOptions { global_tokens, global, scale, .. } = self.options;
        if global_tokens.is_empty() {
            return Ok(near);
        }
        let (queries, keys, values) = match global {
            Some(LongformerGlobal { queries, keys, values }) => (self.bshd(queries)?, keys, values),
            None => {
                let [queries, keys, values] = self.arrays;
                let tokens = Array::from_slice(global_tokens, &[global_tokens.len() as i32]);
                (self.bshd(queries)?.take_axis(tokens, 1)?, keys, values)
            }
        };
        let options = FlashAttentionOptions { scale, ..Default::default() };
        let far = flash_attention(queries, self.bshd(keys)?, self.bshd(values)?, options)?;
        let mut places: Vec<_> = (0..self.heads.query_length).collect();
        for (place, &token) in (self.heads.query_length..).zip(global_tokens) {
            places[token as usize] = place;
        }
        let places = Array::from_slice(&places, &[self.heads.query_length]);
        Ok(concatenate(&[near, far], 1)?.take_axis(places, 1)?)
    }
}

fn check_global(
    check: Check,
    heads: &Heads,
    options: &LongformerAttentionOptions,
    global: LongformerGlobal,
) -> Result<()> {
    let Heads { batch, query_length, kv_heads, size, value_size, dtype, .. } = *heads;
    let (layout, count) = (options.layout, options.global_tokens.len() as i32);
    for (name, array, axes) in [
        ("global.queries", global.queries, layout.axes(batch, count, heads.heads, size)),
        ("global.keys", global.keys, layout.axes(batch, query_length, kv_heads, size)),
        ("global.values", global.values, layout.axes(batch, query_length, kv_heads, value_size)),
    ] {
        check.dtype_among(name, array, &[dtype])?;
        check.shape(name, array, &axes)?;
    }
    Ok(())
}

/// The blocks that hold a key within `window` of some query of each block.
fn rows(window: i32, blocks: Blocks) -> Vec<Vec<i32>> {
    let (size, last) = (blocks.block_size, blocks.key_blocks() - 1);
    let row = |row: i32| {
        let first = (row * size - window).max(0) / size;
        let end = (row * size + size - 1).saturating_add(window) / size;
        (first..=end.min(last)).collect()
    };
    (0..blocks.query_blocks()).map(row).collect()
}
