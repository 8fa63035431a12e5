//! Attention to one stretch of keys after another.

mod chunks;
mod module;

pub use module::{ChunkedCrossAttention, ChunkedCrossAttentionBuilder};

use mlx_rs::{
    Array, Dtype,
    ops::{tri, zeros_dtype},
};

use super::flash::{FlashAttentionOptions, dims::Dims, flash_attention};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    layout::Layout,
};

/// Options of [`chunked_cross_attention`].
#[derive(Debug, Clone)]
pub struct ChunkedCrossAttentionOptions {
    /// How many keys are attended to at once. Default: 1024.
    pub chunk_size: i32,
    /// What the products of queries and keys are multiplied by: any finite number. Default:
    /// `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether query `i` sees only the keys `j ≤ i + query_offset`. Default: no.
    pub causal: bool,
    /// The key beside the first query, which may lie before the first or after the last one: for keys that
    /// are a part of a longer sequence. Default: `S_kv − S_q`, so that the last query stands beside the
    /// last key.
    pub query_offset: Option<i32>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl ChunkedCrossAttentionOptions {
    /// The default of [`Self::chunk_size`].
    pub const DEFAULT_CHUNK_SIZE: i32 = 1024;
}

impl Default for ChunkedCrossAttentionOptions {
    fn default() -> Self {
        Self {
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            scale: None,
            causal: false,
            query_offset: None,
            layout: Layout::default(),
            dispatch: Dispatch::default(),
        }
    }
}

/// Averages `values` for each query as [`flash_attention`] does, a chunk of the keys at a time.
///
/// Each chunk gives a state that [`merge_states`](super::merge_states) could join; they are joined as they
/// come. The gradient computes each chunk anew. So memory is that of `S_q · chunk_size` scores, forward
/// and back, however many keys there are. A query that sees no key yields zero.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`: query head `h`
///   reads head `h / (H / H_kv)`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when
/// `H` is not a multiple of `H_kv`, when the dtypes differ or are not floating point, when
/// `chunk_size` is below one, or when the scale is not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{ChunkedCrossAttentionOptions, chunked_cross_attention};
/// use mlx_rs::Array;
///
/// let queries = Array::ones::<f32>(&[1, 4, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 5000, 2, 64])?;
/// let options = ChunkedCrossAttentionOptions { chunk_size: 512, ..Default::default() };
/// let y = chunked_cross_attention(&queries, &keys, &keys, options)?;
/// assert!(y.all_close(&queries, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` gives each chunk to
/// [`flash_attention_with_lse`](super::flash_attention_with_lse), on whatever backend that picks, and joins
/// in f32; on a CPU all is f32, elsewhere the result of a chunk is rounded. `Reference` is that of
/// [`flash_attention`], with all scores in memory.
///
/// Rabe and Staats, [Self-attention Does Not Need O(n²)
/// Memory](https://arxiv.org/abs/2112.05682), 2021.
pub fn chunked_cross_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: ChunkedCrossAttentionOptions,
) -> Result<Array> {
    let problem = Problem::new([queries.as_ref(), keys.as_ref(), values.as_ref()], &options)?;
    match options.dispatch.resolve(&problem)? {
        _ if problem.is_empty() => problem.zeros(),
        Backend::Reference => problem.reference(),
        _ => chunks::attend(&problem),
    }
}

/// A checked call.
struct Problem<'a> {
    queries: &'a Array,
    keys: &'a Array,
    values: &'a Array,
    scale: f32,
    chunk_size: i32,
    sight: Sight,
    layout: Layout,
    dtype: Dtype,
    dims: Dims,
}

/// The last key that the first query sees, if it does not see all; each next one sees one more.
#[derive(Debug, Clone, Copy)]
struct Sight(Option<i32>);

impl Sight {
    /// `[query_length, end - start]`, true where a query sees one of the keys from `start` on.
    fn of(self, query_length: i32, start: i32, end: i32) -> Result<Option<Array>> {
        let Some(offset) = self.0.filter(|&offset| offset < end - 1) else { return Ok(None) };
        Ok(Some(tri::<bool>(query_length, Some(end - start), Some(offset - start))?))
    }

    /// How many of `key_length` keys anything sees.
    fn end(self, query_length: i32, key_length: i32) -> i32 {
        self.0.map_or(key_length, |offset| (offset + query_length).clamp(0, key_length))
    }
}

impl<'a> Problem<'a> {
    fn new(
        [queries, keys, values]: [&'a Array; 3],
        options: &ChunkedCrossAttentionOptions,
    ) -> Result<Self> {
        let &ChunkedCrossAttentionOptions { chunk_size, scale, layout, .. } = options;
        let check = Check::op(Self::OP);
        let dims = Dims::new(check, [queries, keys, values], layout)?;
        let dtype = dims.dtype;
        check.at_least("chunk_size", chunk_size, 1)?;
        let scale = scale.unwrap_or_else(|| (dims.size as f32).sqrt().recip());
        check.finite("scale", scale)?;
        let offset = options.query_offset.unwrap_or(dims.key_length - dims.query_length);
        // Further away it hides or shows as much, and sums of positions do not overflow.
        let offset = offset.clamp(-dims.query_length, dims.key_length);
        let sight = Sight(options.causal.then_some(offset));
        Ok(Self { queries, keys, values, scale, chunk_size, sight, layout, dtype, dims })
    }

    /// Whether there is nothing to average, or nothing to fill. MLX is not asked then.
    fn is_empty(&self) -> bool {
        self.dims.key_length == 0 || self.dims.result().contains(&0)
    }

    fn zeros(&self) -> Result<Array> {
        let zeros = zeros_dtype(&self.dims.result(), self.dtype)?;
        Ok(self.layout.swap_with_bhsd(&zeros)?)
    }

    fn reference(&self) -> Result<Array> {
        let mask = self.sight.of(self.dims.query_length, 0, self.dims.key_length)?;
        let options = FlashAttentionOptions {
            scale: Some(self.scale),
            mask: mask.as_ref(),
            layout: self.layout,
            dispatch: Dispatch::Only(Backend::Reference),
            ..Default::default()
        };
        flash_attention(self.queries, self.keys, self.values, options)
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "chunked_cross_attention";

    fn choose(&self, _: &Context) -> Backend {
        Backend::Builtin
    }
}
