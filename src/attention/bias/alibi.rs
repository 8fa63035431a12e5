//! Attention with linear biases.

use mlx_rs::{Array, Dtype, ops::zeros_dtype};

use super::Span;
use crate::{
    check::{Check, axes},
    error::Result,
};

/// The slopes of attention with linear biases, one for each head.
///
/// For `n` heads, a power of two, head `h` has the slope `2^(−8 (h + 1) / n)`. For another number, with `n` the power
/// of two below it, the first `n` heads have the slopes of `n` heads, and those that remain every other slope of `2 n`
/// heads, from the first on.
///
/// # Shapes
/// Result: `[H]`, f32.
///
/// # Errors
/// When `num_heads` is not from 1 to 65536.
///
/// # Example
/// ```
/// use mlx_primitives::attention::alibi_slopes;
/// use mlx_rs::array;
///
/// let expected = array!([0.0625, 0.003_906_25, 0.25]);
/// assert!(alibi_slopes(3)?.all_close(expected, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Press et al., [Train Short, Test Long: Attention with Linear Biases Enables Input Length
/// Extrapolation](https://arxiv.org/abs/2108.12409), 2021.
pub fn alibi_slopes(num_heads: i32) -> Result<Array> {
    let known = (1..=MOST_HEADS).contains(&num_heads);
    let expected = format_args!("be from 1 to {MOST_HEADS}");
    Check::op("alibi_slopes").value(known, "num_heads", expected, num_heads)?;
    let slopes: Vec<_> = (0..num_heads).map(|head| slope(head, num_heads) as f32).collect();
    Ok(Array::from_slice(&slopes, &[num_heads]))
}

const MOST_HEADS: i32 = 1 << 16;

fn slope(head: i32, heads: i32) -> f64 {
    let power = 1 << heads.ilog2();
    let (place, of) = if head < power { (head, power) } else { (2 * (head - power), 2 * power) };
    (-8.0 * f64::from(place + 1) / f64::from(of)).exp2()
}

/// Options of [`alibi_bias`].
#[derive(Debug, Clone, Copy, Default)]
pub struct AlibiBiasOptions {
    /// The position of the first query, where that of the first key is 0. Default: `S_kv − S_q`, so that the last query
    /// stands at the last key, as when the keys include a cache of earlier ones.
    pub offset: Option<i32>,
}

/// What attention with linear biases adds to the scores: less, the farther the key is.
///
/// `bias[h, i, j] = −slopes[h] · |offset + i − j|`. Keys behind the query and keys ahead of it count alike.
///
/// # Shapes
/// - `slopes`: `[H]` or `[B, H]`, f32, f16 or bf16
/// - result: `[H, S_q, S_kv]` or `[B, H, S_q, S_kv]`, f32: a mask of [`flash_attention`](crate::attention::flash_attention)
///
/// # Errors
/// When `slopes` has another rank or is not floating point, when a length is not from 0 to 2^24, or when the offset is
/// not within 2^24 of 0.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{FlashAttentionOptions, alibi_bias, alibi_slopes, flash_attention};
/// use mlx_rs::Array;
///
/// let queries = Array::ones::<f32>(&[1, 3, 8, 64])?;
/// let keys = Array::ones::<f32>(&[1, 10, 8, 64])?;
/// let bias = alibi_bias(alibi_slopes(8)?, 3, 10, Default::default())?;
/// let options = FlashAttentionOptions { causal: true, mask: Some(&bias), ..Default::default() };
/// assert_eq!(flash_attention(&queries, &keys, &keys, options)?.shape(), [1, 3, 8, 64]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops, in f32. The result has `H · S_q · S_kv` numbers.
///
/// Press et al., [Train Short, Test Long: Attention with Linear Biases Enables Input Length
/// Extrapolation](https://arxiv.org/abs/2108.12409), 2021.
pub fn alibi_bias(
    slopes: impl AsRef<Array>,
    query_length: i32,
    key_length: i32,
    options: AlibiBiasOptions,
) -> Result<Array> {
    let slopes = slopes.as_ref();
    let check = Check::op("alibi_bias");
    check.floating("slopes", slopes)?;
    match slopes.ndim() {
        2 => check.shape("slopes", slopes, axes!["B", "H"])?,
        _ => check.shape("slopes", slopes, axes!["H"])?,
    }
    let span = Span::new(check, query_length, key_length, options.offset)?;
    let shape = [slopes.shape(), &[query_length, key_length]].concat();
    if shape.contains(&0) {
        return Ok(zeros_dtype(&shape, Dtype::Float32)?);
    }
    let distances = span.relative_positions()?.abs()?.as_dtype(Dtype::Float32)?;
    let falls = slopes.as_dtype(Dtype::Float32)?.negative()?.expand_dims_axes(&[-2, -1])?;
    Ok(distances.multiply(falls)?)
}
