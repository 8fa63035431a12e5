//! All that linear attention remembers.

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, full, indexing::TryIndexOp, zeros},
};

use super::running::{Kind, Running};
use crate::{
    attention::heads::Heads,
    check::{Axis, Check, axes},
    error::Result,
    uploads,
};

/// The sums over the keys so far, of a size that does not depend on their number.
///
/// [`linear_attention_with_state`](super::linear_attention_with_state) and its relatives return it, and take it in their
/// options to go on from there: a prompt in one call and then token by token gives what one long call gives. It belongs
/// to the function and the options that made it.
#[derive(Debug, Clone)]
pub struct LinearAttentionState {
    /// `Σ φ(k) vᵀ`: `[B, H_kv, M, D_v]`, f32, where `M` is the number of features.
    pub sums: Array,
    /// `Σ φ(k)`: `[B, H_kv, M]`, f32.
    pub normalizer: Array,
    /// Where features are exponentials, the largest exponent so far of each: `[B, H_kv, M]`, f32. Both sums are divided
    /// by its exponential, so that they stay in range.
    pub peaks: Option<Array>,
}

impl LinearAttentionState {
    pub(super) fn from_running(running: &Running, value_size: i32) -> Result<Self> {
        let sums = running.sums.squeeze_axes(&[2])?;
        Ok(Self {
            normalizer: sums.try_index((.., .., .., value_size))?,
            sums: sums.try_index((.., .., .., ..value_size))?,
            peaks: running.peaks.as_ref().map(|peaks| peaks.squeeze_axes(&[2, 3])).transpose()?,
        })
    }

    pub(super) fn check(
        &self,
        check: Check,
        heads: &Heads,
        features: i32,
        kind: Kind,
    ) -> Result<()> {
        let Heads { batch, kv_heads, value_size, .. } = *heads;
        let part = |name, array: &Array, axes: &[Axis]| {
            check.dtype_among(name, array, &[Dtype::Float32])?;
            check.shape(name, array, axes)
        };
        part("state.sums", &self.sums, axes![batch, kv_heads, features, value_size])?;
        part("state.normalizer", &self.normalizer, axes![batch, kv_heads, features])?;
        let expected = match kind {
            Kind::Plain => "be absent for these features",
            Kind::Exponents => "be there for exponential features",
        };
        let found = if self.peaks.is_some() { "some" } else { "none" };
        let fits = self.peaks.is_some() == (kind == Kind::Exponents);
        check.value(fits, "state.peaks", expected, found)?;
        match &self.peaks {
            Some(peaks) => part("state.peaks", peaks, axes![batch, kv_heads, features]),
            None => Ok(()),
        }
    }

    pub(super) fn to_running(&self) -> Result<Running> {
        let normalizer = self.normalizer.expand_dims(-1)?;
        let peaks = self.peaks.as_ref().map(|peaks| peaks.expand_dims_axes(&[2, 3]));
        Ok(Running {
            sums: concatenate(&[&self.sums, &normalizer], -1)?.expand_dims(2)?,
            peaks: peaks.transpose()?,
        })
    }
}

/// The sums over no keys.
pub(super) fn nothing(heads: &Heads, features: i32, kind: Kind) -> Result<Running> {
    let Heads { batch, kv_heads, value_size, .. } = *heads;
    let peaks = match kind {
        Kind::Plain => None,
        // Below any exponent, yet a number: of two infinities the difference would be none.
        Kind::Exponents => {
            Some(full::<f32>(&[batch, kv_heads, 1, 1, features], uploads::float(f32::MIN))?)
        }
    };
    Ok(Running { sums: zeros::<f32>(&[batch, kv_heads, 1, features, value_size + 1])?, peaks })
}
