//! Linear attention with features of each element by itself.

use mlx_rs::{
    Array, Dtype,
    ops::{exp, maximum, minimum, select},
};

use super::{
    running::{Common, Kind, Sequence},
    state::LinearAttentionState,
};
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout, uploads};

/// What linear attention makes of each element of a query and of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum FeatureMap {
    /// `φ(x) = elu(x) + 1`: `x + 1` above zero and `exp(x)` below.
    #[default]
    EluPlusOne,
    /// `φ(x) = max(x, 0)`.
    Relu,
    /// `φ(x) = exp(x)`, computed so that nothing overflows.
    Exp,
}

impl FeatureMap {
    /// Every map.
    pub const ALL: &'static [Self] = &[Self::EluPlusOne, Self::Relu, Self::Exp];

    fn kind(self) -> Kind {
        match self {
            Self::EluPlusOne | Self::Relu => Kind::Plain,
            Self::Exp => Kind::Exponents,
        }
    }

    fn of(self, x: &Array) -> Result<Array> {
        let zero = uploads::float(0.0);
        match self {
            Self::EluPlusOne => {
                // The branch that is not taken must not overflow, or its gradient would be NaN. Of equal arguments the second
                // has the gradient.
                let below = exp(minimum(&zero, x)?)?;
                Ok(select(x.gt(&zero)?, x.add(uploads::float(1.0))?, below)?)
            }
            Self::Relu => Ok(maximum(x, zero)?),
            Self::Exp => Ok(x.clone()),
        }
    }
}

/// Options of [`linear_attention`].
#[derive(Debug, Clone, Copy)]
pub struct LinearAttentionOptions<'a> {
    /// What is made of queries and keys. Default: [`FeatureMap::EluPlusOne`].
    pub feature_map: FeatureMap,
    /// Whether query `i` sees only the keys `j ≤ i + S_kv − S_q`: the last query sees every key. Default: no.
    pub causal: bool,
    /// Added to the sum of the weights, which may be zero; from 0. [`FeatureMap::Exp`] needs none and takes none.
    /// Default: 1e-6.
    pub eps: f32,
    /// How many queries are compared with keys directly, from 1, where `causal`. It changes the result by rounding only, except
    /// for [`FeatureMap::Exp`] where an element of a chunk's keys spreads by more than about 80: what later keys of the chunk
    /// dwarf is lost to its earlier queries too. Default: 128.
    pub chunk_size: i32,
    /// What is known of keys before these, which every query sees. Default: nothing.
    pub state: Option<&'a LinearAttentionState>,
    /// The order of the axes of queries, keys, values and result.
    pub layout: Layout,
}

impl LinearAttentionOptions<'_> {
    /// The default of [`LinearAttentionOptions::eps`].
    pub const DEFAULT_EPS: f32 = 1e-6;

    /// The default of [`LinearAttentionOptions::chunk_size`].
    pub const DEFAULT_CHUNK_SIZE: i32 = 128;
}

impl Default for LinearAttentionOptions<'_> {
    fn default() -> Self {
        Self {
            feature_map: FeatureMap::default(),
            causal: false,
            eps: Self::DEFAULT_EPS,
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            state: None,
            layout: Layout::default(),
        }
    }
}

/// Averages `values` for each query, weighted by the product of its features and those of the keys.
///
/// `y_i = Σ_j w_ij v_j / (eps + Σ_j w_ij)` with `w_ij = φ(q_i) · φ(k_j)`, over the keys that query `i` sees. A query
/// whose weights are all zero, or that sees no key, yields zero. Nothing is scaled: queries and keys that are to be
/// scaled come scaled.
///
/// # Shapes
/// In the default layout; [`Layout::Bhsd`] swaps the axes of sequence and heads.
/// - `queries`: `[B, S_q, H, D]`, f32, f16 or bf16
/// - `keys`: `[B, S_kv, H_kv, D]`, the same dtype, where `H` is a multiple of `H_kv`: query head `h` reads head
///   `h / (H / H_kv)`
/// - `values`: `[B, S_kv, H_kv, D_v]`, the same dtype
/// - result: `[B, S_q, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `D` is zero, when `H` is not a multiple
/// of `H_kv`, when the dtypes differ or are not floating point, when `eps` is negative or not finite, when `chunk_size`
/// is below one, or when the state is of other sizes or of other features.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{LinearAttentionOptions, linear_attention};
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 1000, 8, 64])?;
/// let y = linear_attention(&x, &x, &x, LinearAttentionOptions { causal: true, ..Default::default() })?;
/// assert!(y.all_close(&x, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops, in f32. Time grows as `S · D · D_v`, memory as `S · D`, and where `causal` each grows by
/// `S · chunk_size`.
///
/// Katharopoulos et al., [Transformers are RNNs: Fast Autoregressive Transformers with Linear
/// Attention](https://arxiv.org/abs/2006.16236), 2020.
pub fn linear_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: LinearAttentionOptions<'_>,
) -> Result<Array> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    Ok(attend(Check::op("linear_attention"), arrays, options)?.0)
}

/// [`linear_attention`], and what to go on from with later keys: a call for each token costs the same whatever came
/// before.
///
/// # Errors
/// Those of [`linear_attention`].
///
/// # Example
/// ```
/// use mlx_primitives::attention::{LinearAttentionOptions, linear_attention_with_state};
/// use mlx_rs::Array;
///
/// let options = LinearAttentionOptions { causal: true, ..Default::default() };
/// let prompt = Array::ones::<f32>(&[1, 10, 8, 64])?;
/// let (_, state) = linear_attention_with_state(&prompt, &prompt, &prompt, options)?;
/// let token = Array::ones::<f32>(&[1, 1, 8, 64])?;
/// let options = LinearAttentionOptions { state: Some(&state), ..options };
/// let (y, state) = linear_attention_with_state(&token, &token, &token, options)?;
/// assert_eq!((y.shape(), state.sums.shape()), (&[1, 1, 8, 64][..], &[1, 8, 64, 64][..]));
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn linear_attention_with_state(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: LinearAttentionOptions<'_>,
) -> Result<(Array, LinearAttentionState)> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    attend(Check::op("linear_attention_with_state"), arrays, options)
}

fn attend(
    check: Check,
    [queries, keys, values]: [&Array; 3],
    options: LinearAttentionOptions,
) -> Result<(Array, LinearAttentionState)> {
    let LinearAttentionOptions { feature_map, causal, eps, chunk_size, state, layout } = options;
    let heads = Heads::new(check, [queries, keys, values], layout)?;
    let kind = feature_map.kind();
    let common = Common { causal, eps, chunk_size, state, layout };
    common.check(check)?;
    let features = |x| feature_map.of(&layout.swap_with_bhsd(x)?.as_dtype(Dtype::Float32)?);
    let (queries, keys) = (features(queries)?, features(keys)?);
    let eps = if kind == Kind::Exponents { 0.0 } else { eps };
    Sequence { check, heads, kind, queries, keys, values }.attend(Common { eps, ..common })
}
