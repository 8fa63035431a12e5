//! Arrays of any rank as `[O, L, I]`: what stands before the axis, the axis, what stands after.

use mlx_rs::{Array, Dtype, ops::broadcast_to};

use super::options::ScanOptions;
use crate::{
    check::{Axis, Check},
    error::Result,
    scan::segments,
    uploads,
};

/// Where the axis is, and the sizes around it.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) axis: usize,
    pub(super) shape: Vec<i32>,
    /// The segments, where there are any.
    segments: Option<i32>,
}

impl Frame {
    pub(super) fn new(check: Check, x: &Array, options: &ScanOptions) -> Result<Self> {
        let axis = check.axis("axis", options.axis, "x", x)?;
        for beside in [&x.shape()[..axis], &x.shape()[axis + 1..]] {
            let count = beside.iter().try_fold(1_i32, |count, &size| count.checked_mul(size));
            let found = format_args!("{:?}", x.shape());
            check.known(
                count,
                "x",
                "have fewer than 2^31 rows on either side of the axis",
                found,
            )?;
        }
        let segments = segments::along(check, options.segments, x.dim(axis as i32))?;
        Ok(Self { axis, shape: x.shape().to_vec(), segments })
    }

    pub(super) fn outer(&self) -> i32 {
        self.shape[..self.axis].iter().product()
    }

    pub(super) fn length(&self) -> i32 {
        self.shape[self.axis]
    }

    pub(super) fn inner(&self) -> i32 {
        self.shape[self.axis + 1..].iter().product()
    }

    /// States that are kept side by side: one, or one for each segment.
    pub(super) fn count(&self) -> i32 {
        self.segments.unwrap_or(1)
    }

    fn state_shape(&self) -> Vec<i32> {
        let mut shape = self.shape.clone();
        shape.splice(self.axis..=self.axis, self.segments);
        shape
    }

    pub(super) fn check_state(&self, check: Check, state: &Array) -> Result<()> {
        let axes: Vec<_> = self.state_shape().into_iter().map(Axis::Is).collect();
        check.shape("initial_state", state, &axes)
    }

    /// `[O, L, I]`.
    pub(super) fn folded(&self, x: &Array) -> Result<Array> {
        Ok(x.reshape(&[self.outer(), self.length(), self.inner()])?)
    }

    /// What broadcasts to the shape as what broadcasts to `[O, L, I]`; it grows only where it has some of the axes on one
    /// side and not the others.
    pub(super) fn folded_small(&self, array: &Array) -> Result<Array> {
        let mut shape = vec![1; self.shape.len() - array.ndim()];
        shape.extend(array.shape());
        let (mut folded, mut full) = (Vec::new(), shape.clone());
        for (from, to) in [(0, self.axis), (self.axis, self.axis + 1), (self.axis + 1, shape.len())]
        {
            if shape[from..to].iter().any(|&size| size != 1) {
                full[from..to].copy_from_slice(&self.shape[from..to]);
            }
            folded.push(full[from..to].iter().product());
        }
        Ok(broadcast_to(array, &full)?.reshape(&folded)?)
    }

    /// `[O, N, I]`, filled with `nothing` where there is no state.
    pub(super) fn state(&self, state: Option<&Array>, nothing: f32, dtype: Dtype) -> Result<Array> {
        let shape = [self.outer(), self.count(), self.inner()];
        match state {
            Some(state) => Ok(state.as_dtype(dtype)?.reshape(&shape)?),
            None => Ok(broadcast_to(uploads::float(nothing).as_dtype(dtype)?, &shape)?),
        }
    }

    pub(super) fn unfolded(&self, [y, last]: [Array; 2]) -> Result<(Array, Array)> {
        Ok((y.reshape(&self.shape)?, last.reshape(&self.state_shape())?))
    }
}
