//! Softmax attention, estimated from random features.

use mlx_rs::{Array, Dtype, linalg::qr, ops::select, random};

use super::{
    function::LinearAttentionOptions,
    running::{Common, Kind, Sequence},
    state::LinearAttentionState,
};
use crate::{
    attention::heads::Heads,
    check::{Check, axes},
    dispatch::aside,
    error::Result,
    layout::Layout,
    sizes::div_ceil,
    uploads,
};

/// Draws the directions that [`performer_attention`] projects queries and keys on.
///
/// Each row is as a draw of `D` independent normal numbers. Within each block of `D` rows, from the first on, rows are
/// orthogonal, which makes the estimate closer than independent rows do; their lengths are independent of each other
/// and of the directions.
///
/// # Shapes
/// - `key`: `[2]`, u32, of [`mlx_rs::random::key`]
/// - result: `[num_features, dims]`, f32; `M` and `D` of attention
///
/// # Errors
/// When `key` is no key, or when a number is below one or above 2^20.
///
/// # Example
/// ```
/// use mlx_primitives::attention::orthogonal_features;
/// use mlx_rs::random;
///
/// assert_eq!(orthogonal_features(random::key(7)?, 128, 64)?.shape(), [128, 64]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops; the orthogonal matrices come from MLX's decomposition, which runs on the CPU whatever the device.
///
/// Choromanski et al., [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794), 2020.
pub fn orthogonal_features(key: impl AsRef<Array>, num_features: i32, dims: i32) -> Result<Array> {
    const MOST: i32 = 1 << 20;
    let (check, key) = (Check::op("orthogonal_features"), key.as_ref());
    check.dtype_among("key", key, &[Dtype::Uint32])?;
    check.shape("key", key, axes![2])?;
    for (name, count) in [("num_features", num_features), ("dims", dims)] {
        let expected = format_args!("be from 1 to {MOST}");
        check.value((1..=MOST).contains(&count), name, expected, count)?;
    }
    let blocks = div_ceil(num_features, dims);
    let (of_directions, of_lengths) = random::split(key, 2)?;
    let drawn = random::normal::<f32>(&[blocks, dims, dims], None, None, &of_directions)?;
    let (orthogonal, triangle) = aside(|| qr(drawn))?;
    // The decomposition picks the signs, so that without these the directions would not be uniform.
    let signs = triangle.diagonal(None, 1, 2)?.ge(uploads::float(0.0))?;
    let signs = select(signs, uploads::float(1.0), uploads::float(-1.0))?;
    let rows = orthogonal.multiply(signs.expand_dims(1)?)?.swap_axes(1, 2)?;
    let lengths = random::normal::<f32>(&[num_features, dims], None, None, &of_lengths)?;
    let lengths = lengths.square()?.sum_axis(-1, true)?.sqrt()?;
    let first: Vec<_> = (0..num_features).collect();
    let rows = rows.reshape(&[blocks * dims, dims])?;
    let rows = rows.take_axis(Array::from_slice(&first, &[num_features]), 0)?;
    Ok(rows.multiply(lengths)?)
}

/// Options of [`performer_attention`]: [`PerformerAttentionOptions::new`] and what differs from it.
#[derive(Debug, Clone, Copy)]
pub struct PerformerAttentionOptions<'a> {
    /// `[M, D]`, f32, f16 or bf16: the directions that queries and keys are projected on, of
    /// [`orthogonal_features`].
    pub features: &'a Array,
    /// What the products of queries and keys are multiplied by, above zero. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`: the last query sees every key. Default: no.
    pub causal: bool,
    /// See [`LinearAttentionOptions::chunk_size`].
    pub chunk_size: i32,
    /// What is known of keys before these, which every query sees. Default: nothing.
    pub state: Option<&'a LinearAttentionState>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl<'a> PerformerAttentionOptions<'a> {
    /// The defaults, with these features.
    pub fn new(features: &'a Array) -> Self {
        let chunk_size = LinearAttentionOptions::DEFAULT_CHUNK_SIZE;
        let layout = Layout::default();
        Self { features, scale: None, causal: false, chunk_size, state: None, layout }
    }
}

/// Estimates softmax attention from random features, in time linear in the length.
///
/// `y_i = Σ_j w_ij v_j / Σ_j w_ij` with `w_ij = φ(q_i) · φ(k_j)`, over the keys that query `i` sees, and
/// `φ(x)_m = exp(ω_m · x' − |x'|² / 2)` for the `M` features `ω` and `x' = sqrt(scale) · x`. For random features the mean
/// of `w_ij / M` is `exp(scale · q_i · k_j)`, the weight that softmax gives. All exponents are taken below their largest:
/// for a query that of its own features, for keys that of each feature over the keys so far, which cancel in the
/// quotient. A query that sees no key yields zero.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` or `M` is zero, when `H` is not a
/// multiple of `H_kv`, when the dtypes differ or are not floating point, when the scale is not finite and above zero,
/// when `chunk_size` is below one, or when the state is of other sizes or of another function.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{
///     PerformerAttentionOptions, orthogonal_features, performer_attention,
/// };
/// use mlx_rs::{Array, random};
///
/// let features = orthogonal_features(random::key(7)?, 128, 64)?;
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let y = performer_attention(&x, &x, &x, PerformerAttentionOptions::new(&features))?;
/// assert!(y.all_close(&x, None, 1e-4, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops, in f32. Time grows as `S · M · D_v`, memory as `S · M`, and where `causal` each grows by
/// `S · chunk_size`. Within one chunk the exponents of a feature should not spread by more than about 80, or the keys of
/// its early queries vanish beside its later keys.
///
/// Choromanski et al., [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794), 2020.
pub fn performer_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: PerformerAttentionOptions<'_>,
) -> Result<Array> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    Ok(attend(Check::op("performer_attention"), arrays, options)?.0)
}

/// [`performer_attention`], and what to go on from with later keys and the same features.
///
/// # Errors
/// Those of [`performer_attention`].
pub fn performer_attention_with_state(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: PerformerAttentionOptions<'_>,
) -> Result<(Array, LinearAttentionState)> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    attend(Check::op("performer_attention_with_state"), arrays, options)
}

fn attend(
    check: Check,
    [queries, keys, values]: [&Array; 3],
    options: PerformerAttentionOptions,
) -> Result<(Array, LinearAttentionState)> {
    let PerformerAttentionOptions { features, scale, causal, chunk_size, state, layout } = options;
    let heads = Heads::new(check, [queries, keys, values], layout)?;
    check.floating("features", features)?;
    check.shape("features", features, axes!["M", heads.size])?;
    check.at_least("M", features.dim(0), 1)?;
    let scale = scale.unwrap_or_else(|| (heads.size as f32).sqrt().recip());
    check.positive("scale", scale)?;
    let common = Common { causal, eps: 0.0, chunk_size, state, layout };
    common.check(check)?;
    let directions = features.as_dtype(Dtype::Float32)?.swap_axes(0, 1)?;
    let exponents = |x| exponents(&layout.swap_with_bhsd(x)?, scale, &directions);
    let (queries, keys) = (exponents(queries)?, exponents(keys)?);
    Sequence { check, heads, kind: Kind::Exponents, queries, keys, values }.attend(common)
}

/// `[B, H, S, D]` to `[B, H, S, M]`, f32.
fn exponents(x: &Array, scale: f32, directions: &Array) -> Result<Array> {
    let x = x.as_dtype(Dtype::Float32)?.multiply(uploads::float(scale.sqrt()))?;
    let half_square = x.square()?.sum_axis(-1, true)?.multiply(uploads::float(0.5))?;
    Ok(x.matmul(directions)?.subtract(half_square)?)
}
