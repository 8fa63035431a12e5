//! Where the head axis of an attention array stands.

use mlx_rs::{Array, error::Result};

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

    /// Views a rank-4 array of this layout as `[B, H, S, D]`, or such an array in this layout: the
    /// swap is its own inverse. Nothing is copied.
    pub(crate) fn swap_with_bhsd(self, array: &Array) -> Result<Array> {
        match self {
            Self::Bshd => array.swap_axes(1, 2),
            Self::Bhsd => Ok(array.clone()),
        }
    }
}
