//! Exact softmax attention.

mod blocks;
mod builtin;
pub(super) mod dims;
pub(crate) mod kernel;
mod module;
mod options;
mod plan;
mod problem;
mod reference;
mod visible;

pub use module::{FlashAttention, FlashAttentionBuilder, FlashAttentionInput};
pub use options::{AttentionDropout, FlashAttentionOptions, Segments, Window};

use mlx_rs::Array;

use self::problem::{Attended, Problem};
use crate::{dispatch::Backend, error::Result};

/// Averages `values` for each query, weighted by how well the keys match it.
///
/// `y = dropout(softmax(cap(scale · q kᵀ) − slope · distance + mask)) v`, with the softmax over the keys that a query sees
/// and the sink of its head. [`FlashAttentionOptions`] says what each part is. A query that may see no key at all, for
/// whatever reasons together, yields exactly zero, and no gradient flows from it.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`](crate::Layout::Bhsd) swaps the axes of sequence and heads, and copies nothing.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`: query head `h`
///   reads head `h / (H / H_kv)` (grouped-query attention; multi-query for `H_kv = 1`)
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when
/// `H` is not a multiple of `H_kv`, when the dtypes differ or are not floating point, when an option does not have the
/// shape, dtype or range that [`FlashAttentionOptions`] gives it, when there are segments and `B` is not 1, or when the
/// one backend that `dispatch` allows cannot take the problem.
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
/// `Builtin` is MLX's fused op. It has no soft cap, no dropout and no log-sum-exp, and refuses ALiBi and sinks that it would
/// round to f16 or bf16. A window, segments and ALiBi become a mask of `S_q · S_kv`. Where MLX runs it as plain ops (on the CPU,
/// and for some head sizes), it rounds scores to the dtype, and f16 scores beyond 65504 overflow.
///
/// `Kernel` holds no scores in memory, forward or backward. It has no dropout, no heads beyond 256, and leaves the gradient of a
/// mask to the reference. On an NVIDIA GPU a soft cap in bf16 uses the GPU's approximate tanh, within 2^-11 of the capped score,
/// also in the log-sum-exp. For up to 8 queries without mask and segments, it splits the keys over the whole GPU, reads them once
/// for all query heads that share them (up to 16), and does not copy a slice of a cache.
///
/// `Reference` is plain ops in f32 and takes everything; choose it for the
/// gradient of a mask or of slopes on an NVIDIA GPU, which the fused op may refuse. It holds all `B · H · S_q · S_kv` scores
/// in memory. Where they would take more than 16 MiB on a CPU, or 1 GiB on an NVIDIA GPU, and there is no dropout, it takes a
/// block of queries at a time instead: it then holds some blocks of 2 or 128 MiB of scores, or of order `S_q^1.5` for a
/// gradient, which it computes a second time, and never multiplies the keys that causality or a window hides from a whole
/// block. On an NVIDIA GPU that is no bound: MLX holds what it has been handed until it has run, and with a gradient all blocks
/// may be held together.
///
/// `Auto` takes the fused op, except:
/// - on a CPU, for f16, bf16 and long sequences, the reference;
/// - on an NVIDIA GPU, the kernel where it was measured to be faster: for long sequences whose scores the fused op would hold in
///   memory (f32, heads of 192 and 256, and options that it lacks), and in f16 and bf16 for few queries over large caches;
/// - on an NVIDIA GPU, the kernel wherever the reference would go by blocks, for the memory.
///
/// In f32 on an NVIDIA GPU the kernel splits each float into two of 10 bits, which is what matrix instructions read, and adds up
/// three of the four products: as exact as sums in f32.
///
/// Dao et al., [FlashAttention: Fast and Memory-Efficient Exact Attention with
/// IO-Awareness](https://arxiv.org/abs/2205.14135), 2022.
pub fn flash_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: FlashAttentionOptions<'_>,
) -> Result<Array> {
    let inputs = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    Ok(attend(inputs, &options, false)?.output)
}

/// [`flash_attention`], and the logarithm of what each query's weights were divided by.
///
/// `lse = log(Σ exp(score) + exp(sink))`, the sum being over the keys that the query sees, and the sink there only if there are
/// sinks. Two results over disjoint keys can be joined by it. Without a key the sum is empty: −∞, or the sink. Dropout does
/// not change it.
///
/// # Shapes
/// Those of [`flash_attention`], and
/// - `lse`: `[B, H, S_q]` in either layout, f32
///
/// # Errors
/// Those of [`flash_attention`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, flash_attention_with_lse};
/// use mlx_rs::Array;
///
/// let x = Array::zeros::<f32>(&[1, 4, 2, 8])?;
/// let (_, lse) = flash_attention_with_lse(&x, &x, &x, FlashAttentionOptions::default())?;
/// assert!(lse.all_close(Array::full::<f32>(&[1, 2, 4], Array::from_f32(4_f32.ln()))?, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Kernel` and `Reference`; MLX's fused op gives no log-sum-exp.
pub fn flash_attention_with_lse(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: FlashAttentionOptions<'_>,
) -> Result<(Array, Array)> {
    let inputs = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let Attended { output, lse } = attend(inputs, &options, true)?;
    Ok((output, lse.ok_or_else(problem::no_lse)?))
}

fn attend(inputs: [&Array; 3], options: &FlashAttentionOptions, lse: bool) -> Result<Attended> {
    let problem = Problem::new(inputs, options, lse)?;
    let backend = options.dispatch.resolve(&problem)?;
    let attended = match backend {
        _ if problem.is_empty() => problem.nothing(),
        Backend::Builtin => builtin::attend(&problem),
        Backend::Kernel => kernel::attend(&problem),
        Backend::Reference => blocks::by_reference(&problem),
    }?;
    problem.in_layout(attended)
}
