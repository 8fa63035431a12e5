//! Sequences in chunks, heads in groups.

use mlx_rs::{
    Array,
    ops::{indexing::TryIndexOp, pad},
};

use crate::{error::Result, sizes::div_ceil};

/// Sizes that all arrays of a call share.
#[derive(Debug, Clone, Copy)]
pub(in crate::scan) struct Layout {
    pub(in crate::scan) batch: i32,
    /// `L`, one or more.
    pub(in crate::scan) length: i32,
    /// Groups of heads, each with queries and keys of its own.
    pub(in crate::scan) groups: i32,
    /// Heads of a group.
    pub(in crate::scan) repeats: i32,
    /// Steps of a chunk.
    pub(in crate::scan) chunk: i32,
}

impl Layout {
    pub(in crate::scan) fn heads(&self) -> i32 {
        self.groups * self.repeats
    }

    /// How many chunks there are, one at least; the last is filled up with zeros.
    pub(in crate::scan) fn chunks(&self) -> i32 {
        div_ceil(self.length.max(1), self.chunk)
    }

    pub(in crate::scan) fn padding(&self) -> i32 {
        self.chunks() * self.chunk - self.length
    }

    /// `[B, L, G, D]` as `[B, G, 1, n, Q, D]`, and `[B, L, H, D]` as `[B, G, R, n, Q, D]`.
    pub(in crate::scan) fn split(&self, array: &Array) -> Result<Array> {
        let (heads, size) = (array.dim(2), array.dim(3));
        let array = match self.padding() {
            0 => array.clone(),
            padding => pad(array, &[(0, 0), (0, padding), (0, 0), (0, 0)][..], None, None)?,
        };
        let groups = self.groups.min(heads);
        let shape = [self.batch, self.chunks(), self.chunk, groups, heads / groups, size];
        Ok(array.reshape(&shape)?.transpose_axes(&[0, 3, 4, 1, 2, 5])?)
    }

    /// `[B, G, R, n, Q, D]` as `[B, L, H, D]`.
    pub(in crate::scan) fn join(&self, array: &Array) -> Result<Array> {
        let size = array.dim(5);
        let shape = [self.batch, self.chunks() * self.chunk, self.heads(), size];
        let whole = array.transpose_axes(&[0, 3, 4, 1, 2, 5])?.reshape(&shape)?;
        Ok(if self.padding() == 0 { whole } else { whole.try_index((.., ..self.length))? })
    }

    /// `[..., H, K, V]` as `[..., G, R, K, V]`.
    pub(in crate::scan) fn grouped(&self, state: &Array) -> Result<Array> {
        let shape = state.shape();
        let (before, matrix) = shape.split_at(shape.len() - 2);
        let before = &before[..before.len() - 1];
        Ok(state.reshape(&[before, &[self.groups, self.repeats], matrix].concat())?)
    }

    /// `[..., G, R, K, V]` as `[..., H, K, V]`.
    pub(in crate::scan) fn ungrouped(&self, state: &Array) -> Result<Array> {
        let shape = state.shape();
        let (before, matrix) = shape.split_at(shape.len() - 2);
        let before = &before[..before.len() - 2];
        Ok(state.reshape(&[before, &[self.heads()], matrix].concat())?)
    }
}
