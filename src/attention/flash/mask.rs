//! Which keys each query may see.
//!
//! A softmax over no key has no value: MLX answers NaN or the mean of all values, by mask and by
//! device. So a row that hides every key is made to show them all, and its result is cleared
//! afterwards, which leaves it without a gradient too. All of it is lazy.

use mlx_rs::{
    Array, Dtype,
    ops::{select, tri},
};

use crate::error::Result;

/// Additive entries from here down hide their key. Half of the range of f16, so that what remains
/// can be added to a score, or change its base in a kernel, and stay finite.
const HIDES: f32 = -32768.0;

/// The keys that take part in each softmax; never none.
pub(super) enum Visible {
    All,
    /// Those at or before the query, where there are at least as many keys as queries.
    Causal,
    Masked(Mask),
}

impl Visible {
    /// Zeroes the rows of `[B, H, S_q, D_v]` that had no visible key.
    pub(super) fn clear_hidden_rows(&self, attended: Array) -> Result<Array> {
        match self {
            Self::All | Self::Causal => Ok(attended),
            Self::Masked(mask) => {
                let zero = scalar(0.0, attended.dtype())?;
                Ok(select(&mask.any_visible, attended, zero)?)
            }
        }
    }
}

/// A mask that shows every row at least one key.
pub(super) struct Mask {
    safe: Array,
    any_visible: Array,
}

impl Mask {
    /// Combines a boolean or additive mask of rank 4 with a boolean one.
    pub(super) fn new(mask: &Array, also: Option<&Array>) -> Result<Self> {
        let visible = visible_in(mask)?;
        let visible = match also {
            Some(also) => visible.logical_and(also)?,
            None => visible,
        };
        let any_visible = visible.any_axis(-1, true)?;
        let safe = match mask.dtype() {
            Dtype::Bool => visible.logical_or(any_visible.logical_not()?)?,
            dtype => {
                let hidden = scalar(f32::NEG_INFINITY, dtype)?;
                let strict = select(visible, mask, hidden)?;
                select(&any_visible, strict, scalar(0.0, dtype)?)?
            }
        };
        Ok(Self { safe, any_visible })
    }

    /// Boolean if the mask was, else additive.
    pub(super) fn safe(&self) -> &Array {
        &self.safe
    }
}

/// `[S_q, S_kv]`, true where `j ≤ i + S_kv − S_q`.
pub(super) fn causal(query_length: i32, key_length: i32) -> Result<Array> {
    Ok(tri::<bool>(query_length, Some(key_length), Some(key_length - query_length))?)
}

/// Views a mask as `[B, H, S_q, S_kv]` with ones for missing axes; `dtype` if it is additive.
pub(super) fn with_rank_4(mask: &Array, dtype: Dtype) -> Result<Array> {
    let missing: Vec<_> = (0..4 - mask.ndim() as i32).collect();
    let mask = mask.expand_dims_axes(&missing)?;
    match mask.dtype() {
        Dtype::Bool => Ok(mask),
        _ => Ok(mask.as_dtype(dtype)?),
    }
}

fn visible_in(mask: &Array) -> Result<Array> {
    match mask.dtype() {
        Dtype::Bool => Ok(mask.clone()),
        // Not `mask > HIDES`: NaN must reach the result.
        dtype => Ok(mask.le(scalar(HIDES, dtype)?)?.logical_not()?),
    }
}

fn scalar(value: f32, dtype: Dtype) -> Result<Array> {
    Ok(Array::from_f32(value).as_dtype(dtype)?)
}
