//! Exact softmax attention.

mod dims;
mod mask;
mod module;
mod reference;

pub use module::{FlashAttention, FlashAttentionBuilder, FlashAttentionInput};

use mlx_rs::{
    Array, Dtype,
    fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention},
    ops::{indexing::TryIndexOp, pad, zeros_dtype, zeros_like},
};

use self::{
    dims::Dims,
    mask::{Mask, Visible},
};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched, Target},
    error::Result,
    layout::Layout,
};

/// Options of [`flash_attention`].
#[derive(Debug, Clone, Default)]
pub struct FlashAttentionOptions<'a> {
    /// What the products of queries and keys are multiplied by: any finite number. Zero weighs all
    /// visible keys alike, and below zero the least similar weighs most. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`: the last query sees every key, as
    /// when the keys include a cache of earlier ones. Default: no.
    pub causal: bool,
    /// Which keys each query may see, on top of `causal`: broadcastable to `[B, H, S_q, S_kv]`
    /// whatever the layout. Booleans are true where it may. Floats are added to the scores in the
    /// dtype of the queries; −32768 or less, so −∞ too, hides the key altogether.
    pub mask: Option<&'a Array>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// Averages `values` for each query, weighted by how well the keys match it.
///
/// `y = softmax(scale · q kᵀ + mask) v`, with the softmax over the keys. A query that may see no key
/// at all, whether for its mask, for causality or for both together, yields exactly zero, and no
/// gradient flows from it.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads, and copies nothing.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`: query head `h`
///   reads head `h / (H / H_kv)` (grouped-query attention; multi-query for `H_kv = 1`)
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when
/// `H` is not a multiple of `H_kv`, when the dtypes differ or are not floating point, when the mask
/// does not broadcast or holds integers, or when the scale is not finite.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, flash_attention};
/// use mlx_rs::Array;
///
/// let queries = Array::ones::<f32>(&[1, 3, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 10, 2, 64])?;
/// let options = FlashAttentionOptions { causal: true, ..Default::default() };
/// let y = flash_attention(&queries, &keys, &keys, options)?;
/// assert!(y.all_close(&queries, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused op, and what `Auto` takes, but for f16 and bf16 on a CPU. Where it runs as plain ops (on the CPU, and
/// for some head sizes), it rounds scores to the dtype, and f16 scores beyond 65504 overflow.
/// `Reference` is plain ops in f32; choose it for the gradient of a mask on an NVIDIA GPU, which the
/// fused op may refuse.
///
/// Dao et al., [FlashAttention: Fast and Memory-Efficient Exact Attention with
/// IO-Awareness](https://arxiv.org/abs/2205.14135), 2022.
pub fn flash_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: FlashAttentionOptions<'_>,
) -> Result<Array> {
    let problem = Problem::new(queries.as_ref(), keys.as_ref(), values.as_ref(), &options)?;
    let backend = options.dispatch.resolve(&problem)?;
    if problem.is_empty() {
        return problem.zeros();
    }
    let operands = problem.operands()?;
    let attended = match backend {
        Backend::Reference => reference::attend(&operands)?,
        _ => builtin(&operands)?,
    };
    problem.restore(&attended)
}

/// A checked call.
struct Problem<'a> {
    queries: &'a Array,
    keys: &'a Array,
    values: &'a Array,
    mask: Option<&'a Array>,
    scale: f32,
    causal: bool,
    layout: Layout,
    dtype: Dtype,
    dims: Dims,
}

impl<'a> Problem<'a> {
    fn new(
        queries: &'a Array,
        keys: &'a Array,
        values: &'a Array,
        options: &FlashAttentionOptions<'a>,
    ) -> Result<Self> {
        let &FlashAttentionOptions { scale, causal, mask, layout, .. } = options;
        let check = Check::op(Self::OP);
        let dtype = check.floating("queries", queries)?;
        check.dtype_among("keys", keys, &[dtype])?;
        check.dtype_among("values", values, &[dtype])?;
        let dims = Dims::new(check, queries, keys, values, layout)?;
        if let Some(mask) = mask {
            check.mask(mask, &dims.scores())?;
        }
        let scale = scale.unwrap_or_else(|| (dims.size as f32).sqrt().recip());
        check.finite("scale", scale)?;
        Ok(Self { queries, keys, values, mask, scale, causal, layout, dtype, dims })
    }

    /// Whether there is nothing to average, or nothing to fill. MLX is not asked then.
    fn is_empty(&self) -> bool {
        self.dims.key_length == 0 || self.dims.result().contains(&0)
    }

    fn zeros(&self) -> Result<Array> {
        let zeros = zeros_dtype(&self.dims.result(), self.dtype)?;
        Ok(self.layout.swap_with_bhsd(&zeros)?)
    }

    /// How many of the first queries come before every key.
    fn queries_before_keys(&self) -> i32 {
        if self.causal { (self.dims.query_length - self.dims.key_length).max(0) } else { 0 }
    }

    fn operands(&self) -> Result<Operands> {
        let queries = self.layout.swap_with_bhsd(self.queries)?;
        Ok(Operands {
            queries: skip_rows(&queries, self.queries_before_keys())?,
            keys: self.layout.swap_with_bhsd(self.keys)?,
            values: self.layout.swap_with_bhsd(self.values)?,
            visible: self.visible()?,
            scale: self.scale,
        })
    }

    fn visible(&self) -> Result<Visible> {
        let skipped = self.queries_before_keys();
        let rows = self.dims.query_length - skipped;
        // A single query is the last one, which sees every key.
        let causal = self.causal && rows > 1;
        let Some(mask) = self.mask else {
            return Ok(if causal { Visible::Causal } else { Visible::All });
        };
        let mask = skip_rows(&mask::with_rank_4(mask, self.dtype)?, skipped)?;
        let causal = causal.then(|| mask::causal(rows, self.dims.key_length)).transpose()?;
        Ok(Visible::Masked(Mask::new(&mask, causal.as_ref())?))
    }

    /// Gives the skipped queries their zeros and the result its layout.
    fn restore(&self, attended: &Array) -> Result<Array> {
        let result = match self.queries_before_keys() {
            0 => attended.clone(),
            skipped => pad(attended, &[(0, 0), (0, 0), (skipped, 0), (0, 0)], None, None)?,
        };
        Ok(self.layout.swap_with_bhsd(&result)?)
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "flash_attention";

    fn choose(&self, context: &Context) -> Backend {
        match (context.target, self.dtype) {
            // There MLX multiplies half precision without BLAS and rounds the scores to it.
            (Target::Cpu, Dtype::Float16 | Dtype::Bfloat16) => Backend::Reference,
            _ => Backend::Builtin,
        }
    }
}

/// What the backends compute on: `[B, H, S, D]` views in which causality hides no whole row.
struct Operands {
    queries: Array,
    keys: Array,
    values: Array,
    visible: Visible,
    scale: f32,
}

/// Leaves out the first rows of a `[B, H, S, D]` array, unless one row stands for all.
fn skip_rows(array: &Array, count: i32) -> Result<Array> {
    if count == 0 || array.shape()[2] == 1 {
        return Ok(array.clone());
    }
    Ok(array.try_index((.., .., count.., ..))?)
}

fn builtin(operands: &Operands) -> Result<Array> {
    let Operands { queries, keys, values, visible, scale } = operands;
    let mask = match visible {
        Visible::All => None,
        Visible::Causal => Some(ScaledDotProductAttentionMask::Causal),
        Visible::Masked(mask) => Some(ScaledDotProductAttentionMask::Array(mask.safe())),
    };
    let (queries, scale) = with_positive_scale(queries, *scale)?;
    let attended = scaled_dot_product_attention(queries, keys, values, scale, mask, None)?;
    visible.clear_hidden_rows(attended)
}

/// Queries and a scale above zero that give the same scores: cuDNN answers NaN to any other.
fn with_positive_scale(queries: &Array, scale: f32) -> Result<(Array, f32)> {
    Ok(match scale {
        0.0 => (zeros_like(queries)?, 1.0),
        scale if scale < 0.0 => (queries.negative()?, -scale),
        scale => (queries.clone(), scale),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn half_precision_on_a_cpu_goes_around_the_fused_op() {
        use Backend::{Builtin, Reference};
        for (target, dtype, expected) in [
            (Target::Cpu, Dtype::Float32, Builtin),
            (Target::Cpu, Dtype::Float16, Reference),
            (Target::Cpu, Dtype::Bfloat16, Reference),
            (Target::Metal, Dtype::Float16, Builtin),
            (Target::Cuda, Dtype::Bfloat16, Builtin),
        ] {
            let x = Array::from_slice(&[0.0_f32; 4], &[1, 1, 1, 4]).as_dtype(dtype).ok();
            let problem = x.as_ref().map(|x| Problem::new(x, x, x, &Default::default()));
            let context = Context { target, obstacle: None, settings: Settings::default() };
            let chosen = problem.and_then(Result::ok).map(|problem| problem.choose(&context));
            assert_eq!(chosen, Some(expected), "{target:?} {dtype:?}");
        }
    }
}
