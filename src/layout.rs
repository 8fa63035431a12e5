//! Where the head axis of an attention array stands.

use mlx_rs::{Array, error::Result};

use crate::check::Axis;

/// The order of the axes of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[B, S, H, D]`: batch, sequence, heads, head size. What a projection yields when its last
    /// axis is split into heads.
    #[default]
    Bshd,
    /// `[B, H, S, D]`: batch, heads, sequence, head size. What MLX's own attention reads.
    Bhsd,
}

impl Layout {
    /// The index of the sequence axis.
    pub const fn sequence_axis(self) -> i32 {
        match self {
            Self::Bshd => 1,
            Self::Bhsd => 2,
        }
    }

    /// The index of the head axis.
    pub const fn head_axis(self) -> i32 {
        match self {
            Self::Bshd => 2,
            Self::Bhsd => 1,
        }
    }

    /// `[B, S, H, D]` of a rank-4 array of this layout, whichever order it stores them in.
    pub(crate) fn dims(self, array: &Array) -> [i32; 4] {
        [array.dim(0), array.dim(self.sequence_axis()), array.dim(self.head_axis()), array.dim(3)]
    }

    /// The shape of an array of this layout, of `[B, S, H, D]`.
    pub(crate) fn shape(self, [batch, sequence, heads, size]: [i32; 4]) -> [i32; 4] {
        match self {
            Self::Bshd => [batch, sequence, heads, size],
            Self::Bhsd => [batch, heads, sequence, size],
        }
    }

    /// The axes to check an array of this layout for, in the order it stores them.
    pub(crate) fn axes(
        self,
        batch: impl Into<Axis>,
        sequence: impl Into<Axis>,
        heads: impl Into<Axis>,
        size: impl Into<Axis>,
    ) -> [Axis; 4] {
        let (batch, sequence, heads, size) =
            (batch.into(), sequence.into(), heads.into(), size.into());
        match self {
            Self::Bshd => [batch, sequence, heads, size],
            Self::Bhsd => [batch, heads, sequence, size],
        }
    }

    /// Views a rank-4 array of this layout as `[B, H, S, D]`, or such an array in this layout: the
    /// swap is its own inverse. Nothing is copied.
    pub(crate) fn swap_with_bhsd(self, array: &Array) -> Result<Array> {
        match self {
            Self::Bshd => array.swap_axes(1, 2),
            Self::Bhsd => Ok(array.clone()),
        }
    }
}
