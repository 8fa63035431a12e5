//! Overlapping stretches of a sequence, without a copy.

use mlx_rs::{
    Array, Dtype,
    ops::{indexing::TryIndexOp, pad},
};

use crate::{error::Result, kernel::differentiable, layout::Layout};

/// `count` stretches of `length` rows, the first of which begins at row `start`, and each other
/// `step` rows after the one before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overlap {
    pub(super) start: i32,
    pub(super) step: i32,
    pub(super) count: i32,
    pub(super) length: i32,
}

impl Overlap {
    /// Views an array of `layout` as `[B · count, H, length, D]`, the stretches of each sequence
    /// together.
    ///
    /// MLX copies the array once if it does not lie in memory in the order of its layout, and the
    /// stretches if there is more than one sequence. Its own gradient of such a view adds up
    /// numbers one by one; this one adds up arrays.
    pub(super) fn view(self, array: &Array, layout: Layout) -> Result<Array> {
        let (rows, dtype) = (array.dim(layout.sequence_axis()), array.dtype());
        let strided = move |[array]: &[Array; 1]| Ok([self.strided(array, layout)?]);
        let [view] = differentiable(
            [array],
            strided,
            move |vjp| {
                let sum = self.sum(&vjp.cotangents[0], rows)?;
                Ok([layout.swap_with_bhsd(&sum.as_dtype(dtype)?)?])
            },
            strided,
        )?;
        Ok(view.flatten(0, 1)?)
    }

    /// `[B, count, H, length, D]`.
    fn strided(self, array: &Array, layout: Layout) -> Result<Array> {
        let [batch, rows, heads, size] = layout.dims(array);
        let (rows, heads_here, width) = (i64::from(rows), i64::from(heads), i64::from(size));
        let (row, head) = match layout {
            Layout::Bshd => (heads_here * width, width),
            Layout::Bhsd => (width, rows * width),
        };
        let shape = [batch, self.count, heads, self.length, size];
        let strides = [rows * heads_here * width, i64::from(self.step) * row, head, row, 1];
        let offset = i64::from(self.start) * row;
        Ok(array.contiguous()?.as_strided(&shape[..], &strides[..], offset as usize)?)
    }

    /// Adds up `[B, count, H, length, D]` where stretches overlap: `[B, H, rows, D]`, in f32, so
    /// that it is rounded once.
    fn sum(self, stretches: &Array, rows: i32) -> Result<Array> {
        let stretches = stretches.swap_axes(1, 2)?;
        let pieces = (self.length + self.step - 1) / self.step;
        let mut sum = self.piece(&stretches, 0, pieces)?;
        for index in 1..pieces {
            sum = sum.add(self.piece(&stretches, index, pieces)?)?;
        }
        let used = (self.count - 1) * self.step + self.length;
        let sum = sum.try_index((.., .., 0..used, ..))?;
        padded(&sum, 2, (self.start, rows - self.start - used))
    }

    /// Piece `index` of every stretch of `[B, H, count, length, D]`, at most `step` rows long, so
    /// that they lie side by side: `[B, H, (count + pieces − 1) · step, D]`.
    fn piece(self, stretches: &Array, index: i32, pieces: i32) -> Result<Array> {
        let Self { step, length, .. } = self;
        let (from, to) = (index * step, ((index + 1) * step).min(length));
        let piece = stretches.try_index((.., .., .., from..to, ..))?.as_dtype(Dtype::Float32)?;
        let piece = padded(&piece, 3, (0, step - (to - from)))?.flatten(2, 3)?;
        padded(&piece, 2, (from, (pieces - 1 - index) * step))
    }
}

/// Adds rows of zeros before and after, along `axis`.
fn padded(array: &Array, axis: usize, added: (i32, i32)) -> Result<Array> {
    if added == (0, 0) {
        return Ok(array.clone());
    }
    let mut widths = vec![(0, 0); array.ndim()];
    widths[axis] = added;
    Ok(pad(array, &widths[..], None, None)?)
}
