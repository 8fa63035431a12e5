//! What blocks of Mamba remember, and take.

use mlx_rs::Array;

/// What a [`MambaBlock`](super::MambaBlock) or a [`Mamba2Block`](super::Mamba2Block) knows of the steps so far, however
/// many. It begins with none.
#[derive(Debug, Clone, Default)]
pub struct MambaState {
    pub(super) parts: Option<[Array; 2]>,
}

impl MambaState {
    /// The last `d_conv − 1` inputs of the convolution, `[B, d_conv − 1, channels it is over]`, once there were some.
    pub fn conv(&self) -> Option<&Array> {
        self.parts.as_ref().map(|[conv, _]| conv)
    }

    /// The state of the scan, f32, once there is one: `[B, channels inside, d_state]`, or of a block of Mamba-2
    /// `[B, heads, head_dim, d_state]`.
    pub fn scan(&self) -> Option<&Array> {
        self.parts.as_ref().map(|[_, scan]| scan)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Input of blocks of Mamba and of [`MambaLayer`](super::MambaLayer): `x`, and what is known of earlier steps.
#[derive(Debug)]
pub struct MambaInput<'a> {
    /// `[B, L, dims]`.
    pub x: &'a Array,
    /// Of one layer and one batch of sequences; this call adds its steps, unless it fails.
    pub state: Option<&'a mut MambaState>,
}

impl<'a> From<&'a Array> for MambaInput<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, state: None }
    }
}

impl<'a> From<(&'a Array, &'a mut MambaState)> for MambaInput<'a> {
    fn from((x, state): (&'a Array, &'a mut MambaState)) -> Self {
        Self { x, state: Some(state) }
    }
}
