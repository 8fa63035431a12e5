//! Attention to the keys nearby.

mod blocks;
mod module;
mod overlap;
mod plan;
mod whole;

pub use module::{SlidingWindowAttention, SlidingWindowAttentionBuilder};

use mlx_rs::{Array, Dtype, ops::zeros_dtype};

use self::plan::Band;
use super::flash::{self, dims::Dims};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    layout::Layout,
};

/// Options of [`sliding_window_attention`].
#[derive(Debug, Clone)]
pub struct SlidingWindowOptions {
    /// What the products of queries and keys are multiplied by: any finite number. Default:
    /// `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether a query sees no key after its own. Default: yes.
    pub causal: bool,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for SlidingWindowOptions {
    fn default() -> Self {
        Self { scale: None, causal: true, layout: Layout::default(), dispatch: Dispatch::default() }
    }
}

/// Averages the values near each query, weighted by how well their keys match it.
///
/// `y = softmax(scale · q kᵀ) v` over the keys `p − window_size ≤ j ≤ p`, or up to `p + window_size`
/// unless causal, where `p = i + S_kv − S_q` is the key that query `i` stands on: the last query on
/// the last key. A query that sees no key yields zero.
///
/// `window_size` counts the keys before the query's own, so a query sees `window_size + 1` of them
/// and 0 leaves it with its own. Where a model says how many tokens a query sees, its own included,
/// as Mistral's `sliding_window` does, pass one less.
///
/// Time and memory grow with `S_q · window_size`, not with `S_q · S_kv`, forward and back.
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
/// `window_size` is negative, or when the scale is not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::attention::sliding_window_attention;
/// use mlx_rs::Array;
///
/// let queries = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 1000, 2, 64])?;
/// let y = sliding_window_attention(&queries, &keys, &keys, 127, Default::default())?;
/// assert!(y.all_close(&queries, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` cuts the queries into blocks and gives each, in MLX's fused op, the stretch of keys that
/// it sees; the stretches overlap in memory and are copied only for several sequences under a window
/// no longer than a block. On a CPU it computes in f32. `Kernel` and `Reference` are those of
/// [`flash_attention`](super::flash_attention) with a window: a kernel that skips the keys outside, for heads of up to 256
/// elements, which `Auto` takes for f16 and bf16 where it was measured to win; and plain ops.
///
/// Beltagy et al., [Longformer: The Long-Document Transformer](https://arxiv.org/abs/2004.05150),
/// 2020.
pub fn sliding_window_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    window_size: i32,
    options: SlidingWindowOptions,
) -> Result<Array> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let problem = Problem::new(arrays, window_size, &options)?;
    match options.dispatch.resolve(&problem)? {
        _ if problem.is_empty() => problem.zeros(),
        Backend::Builtin => blocks::attend(&problem),
        backend => whole::attend(&problem, backend),
    }
}

/// A checked call.
struct Problem<'a> {
    queries: &'a Array,
    keys: &'a Array,
    values: &'a Array,
    scale: f32,
    window_size: i32,
    causal: bool,
    band: Band,
    layout: Layout,
    dtype: Dtype,
    dims: Dims,
}

impl<'a> Problem<'a> {
    fn new(
        [queries, keys, values]: [&'a Array; 3],
        window_size: i32,
        options: &SlidingWindowOptions,
    ) -> Result<Self> {
        let &SlidingWindowOptions { scale, causal, layout, .. } = options;
        let check = Check::op(Self::OP);
        let dims = Dims::new(check, [queries, keys, values], layout)?;
        let dtype = dims.dtype;
        check.at_least("window_size", window_size, 0)?;
        let scale = scale.unwrap_or_else(|| (dims.size as f32).sqrt().recip());
        check.finite("scale", scale)?;
        let band = Band::new(dims.query_length, dims.key_length, window_size, causal);
        Ok(Self { queries, keys, values, scale, window_size, causal, band, layout, dtype, dims })
    }

    /// Whether there is nothing to average, or nothing to fill. MLX is not asked then.
    fn is_empty(&self) -> bool {
        self.dims.key_length == 0 || self.dims.result().contains(&0)
    }

    fn zeros(&self) -> Result<Array> {
        let zeros = zeros_dtype(&self.dims.result(), self.dtype)?;
        Ok(self.layout.swap_with_bhsd(&zeros)?)
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "sliding_window_attention";

    fn choose(&self, context: &Context) -> Backend {
        let half = self.dtype != Dtype::Float32;
        let measured = half && context.kernel_wins(Self::OP, self.keys.size());
        let kernel = measured && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Builtin }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        let arrays = [self.queries, self.keys, self.values];
        match backend {
            Backend::Kernel => {
                context.obstacle.or_else(|| flash::kernel::refusal_of(arrays, &self.dims))
            }
            Backend::Builtin | Backend::Reference => None,
        }
    }
}
