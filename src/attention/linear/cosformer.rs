//! Linear attention that weighs near keys more.

use std::f32::consts::FRAC_PI_2;

use mlx_rs::{
    Array, Dtype,
    ops::{arange, concatenate, maximum},
};

use super::{
    function::LinearAttentionOptions,
    running::{Common, Kind, Sequence},
    state::LinearAttentionState,
};
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout, uploads};

/// Options of [`cosformer_attention`].
#[derive(Debug, Clone, Copy)]
pub struct CosFormerAttentionOptions<'a> {
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`: the last query sees every key. Default: no.
    pub causal: bool,
    /// `N`: the distance at which a key would weigh nothing, at least `offset + S_kv` and at least `S_q`, and at most
    /// 2^24. Default: the larger of these two; a call with a state has to name the one that its state was made with.
    pub max_length: Option<i32>,
    /// The position of the first key, from 0: how many keys the state has seen. Default: 0.
    pub offset: i32,
    /// Added to the sum of the weights, which may be zero; from 0. Default: 1e-6.
    pub eps: f32,
    /// See [`LinearAttentionOptions::chunk_size`].
    pub chunk_size: i32,
    /// What is known of keys before these, which every query sees. Default: nothing.
    pub state: Option<&'a LinearAttentionState>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl Default for CosFormerAttentionOptions<'_> {
    fn default() -> Self {
        let LinearAttentionOptions { causal, eps, chunk_size, layout, .. } = Default::default();
        Self { causal, max_length: None, offset: 0, eps, chunk_size, state: None, layout }
    }
}

/// Averages `values` for each query, weighted by the product of non-negative queries and keys and by a cosine of their
/// distance.
///
/// `y_i = Σ_j w_ij v_j / (eps + Σ_j w_ij)` with `w_ij = relu(q_i) · relu(k_j) · cos(π/2 · (p_i − p_j) / N)`, over the keys
/// that query `i` sees, where the last query stands at the last key: `p_j = offset + j` and
/// `p_i = offset + S_kv − S_q + i`. The cosine of a difference is a sum of products of cosines and of sines, so each
/// element has two features. A query whose weights are all zero, or that sees no key, yields zero.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when `H` is not a multiple
/// of `H_kv`, when the dtypes differ or are not floating point, when `max_length` is too small or too large, or missing
/// where there is a state, when `offset` is negative or beyond `2^24`, when `eps` is negative or not finite, when
/// `chunk_size` is below one, or when the state is of other sizes or of another function.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{CosFormerAttentionOptions, cosformer_attention};
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let options = CosFormerAttentionOptions { causal: true, ..Default::default() };
/// assert!(cosformer_attention(&x, &x, &x, options)?.all_close(&x, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops, in f32. Time grows as `S · 2D · D_v`, memory as `S · 2D`, and where `causal` each grows by
/// `S · chunk_size`.
///
/// Qin et al., [cosFormer: Rethinking Softmax in Attention](https://arxiv.org/abs/2202.08791), 2022.
pub fn cosformer_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: CosFormerAttentionOptions<'_>,
) -> Result<Array> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    Ok(attend(Check::op("cosformer_attention"), arrays, options)?.0)
}

/// [`cosformer_attention`], and what to go on from with later keys, under the same `max_length` and with `offset` grown
/// by `S_kv`.
///
/// # Errors
/// Those of [`cosformer_attention`].
pub fn cosformer_attention_with_state(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: CosFormerAttentionOptions<'_>,
) -> Result<(Array, LinearAttentionState)> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    attend(Check::op("cosformer_attention_with_state"), arrays, options)
}

/// Positions up to here are exact in f32.
const FARTHEST: i32 = 1 << 24;

fn attend(
    check: Check,
    [queries, keys, values]: [&Array; 3],
    options: CosFormerAttentionOptions,
) -> Result<(Array, LinearAttentionState)> {
    let CosFormerAttentionOptions { causal, offset, eps, chunk_size, state, layout, .. } = options;
    let heads = Heads::new(check, [queries, keys, values], layout)?;
    let length = checked_length(check, &heads, &options)?;
    let common = Common { causal, eps, chunk_size, state, layout };
    common.check(check)?;
    let features = |x, first| {
        let x = layout.swap_with_bhsd(x)?.as_dtype(Dtype::Float32)?;
        features(&x, first, length)
    };
    let queries = features(queries, offset + heads.key_length - heads.query_length)?;
    let keys = features(keys, offset)?;
    Sequence { check, heads, kind: Kind::Plain, queries, keys, values }.attend(common)
}

fn checked_length(check: Check, heads: &Heads, options: &CosFormerAttentionOptions) -> Result<f32> {
    let CosFormerAttentionOptions { max_length, offset, state, .. } = *options;
    let expected = format_args!("be from 0 to {FARTHEST}");
    check.value((0..=FARTHEST).contains(&offset), "offset", expected, offset)?;
    let least = offset.saturating_add(heads.key_length).max(heads.query_length).max(1);
    let named = if state.is_some() { max_length } else { Some(max_length.unwrap_or(least)) };
    let length = check.known(named, "max_length", "be given with a state", "none")?;
    let expected = format_args!("be from {least} to {FARTHEST}");
    check.value((least..=FARTHEST).contains(&length), "max_length", expected, length)?;
    Ok(length as f32)
}

/// `[B, H, S, D]`, of which the first stands at `first`, to `[B, H, S, 2 D]`.
fn features(x: &Array, first: i32, length: f32) -> Result<Array> {
    let positions = arange::<_, f32>(first, first + x.dim(-2), None)?.expand_dims(-1)?;
    let angles = positions.multiply(uploads::float(FRAC_PI_2 / length))?;
    let positive = maximum(x, uploads::float(0.0))?;
    let turned = [positive.multiply(angles.cos()?)?, positive.multiply(angles.sin()?)?];
    Ok(concatenate(&turned, -1)?)
}
