//! How heads are shared out over threads: the geometry that `metal/common/heads.metal` reads.

use mlx_rs::{Array, Dtype, error::Result};

use crate::{kernel::Launch, layout::Layout};

/// What a thread has of a head, and of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Heads of one token for which its sines and cosines are computed once, and which are loaded together.
    pub(super) heads: i32,
    /// Threads that share a head.
    pub(super) lanes: i32,
}

impl Geometry {
    /// Threads of a group.
    const GROUP: i32 = 256;
    /// Threads of a simdgroup, on Apple GPUs and NVIDIA's alike.
    const SIMD: i32 = 32;
    /// Slots that a thread should hold: enough to have loads in flight, few enough for its registers.
    const SLOTS_WANTED: i32 = 4;

    /// For heads of `size` elements of which `dims` turn, and threads that know nothing of each other.
    pub(super) fn apart(dims: i32, size: i32, dtype: Dtype) -> Self {
        let slots = slots(dims, size, dtype);
        let lanes = slots.min(Self::SIMD);
        Self { heads: Self::SLOTS_WANTED, lanes }
    }

    /// Groups for an array that [`by_token`] views.
    pub(super) fn groups(&self, view: &Array) -> i32 {
        let units = view.dim(0) * view.dim(2) * div_ceil(view.dim(1), self.heads);
        div_ceil(units, Self::GROUP / self.lanes)
    }

    pub(super) fn launch(groups: i32, threadgroup_bytes: i32) -> Launch {
        Launch {
            groups: [groups.unsigned_abs(), 1, 1],
            group: [Self::GROUP.unsigned_abs(), 1, 1],
            threadgroup_bytes: threadgroup_bytes.unsigned_abs(),
        }
    }
}

/// Views an array of this layout as `[outer, heads, inner, D]`, in which token number `outer · inners + inner` counts
/// batch by batch. Nothing is moved.
pub(super) fn by_token(x: &Array, layout: Layout) -> Result<Array> {
    let [batch, steps, heads, size] = layout.dims(x);
    match layout {
        Layout::Bshd => x.reshape(&[batch * steps, heads, 1, size]),
        Layout::Bhsd => Ok(x.clone()),
    }
}

/// Pieces of two chunks of 16 bytes that a head is cut into: first what turns, then what passes through.
fn slots(dims: i32, size: i32, dtype: Dtype) -> i32 {
    let chunk = if dtype == Dtype::Float32 { 4 } else { 8 };
    div_ceil(dims / 2, chunk) + div_ceil(size - dims, 2 * chunk)
}

/// Division of counts, rounded up.
fn div_ceil(count: i32, by: i32) -> i32 {
    count / by + i32::from(count % by != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_head_takes_a_quarter_of_a_simdgroup() {
        let geometry = Geometry::apart(128, 128, Dtype::Bfloat16);
        assert_eq!(geometry, Geometry { heads: 4, lanes: 8 });
        assert_eq!(Geometry::apart(80, 80, Dtype::Bfloat16).lanes, 5);
        assert_eq!(Geometry::apart(2, 4096, Dtype::Bfloat16).lanes, 32);
    }

    #[test]
    fn every_unit_has_its_threads() {
        let geometry = Geometry { heads: 4, lanes: 5 };
        let heads = |shape: [i32; 4]| {
            let zeros = vec![0.0_f32; shape.iter().product::<i32>() as usize];
            Array::from_slice(&zeros, &shape)
        };
        assert_eq!(geometry.groups(&heads([1, 1, 1, 2])), 1);
        assert_eq!(geometry.groups(&heads([51, 4, 1, 2])), 1);
        assert_eq!(geometry.groups(&heads([51, 5, 1, 2])), 2);
        assert_eq!(geometry.groups(&heads([1, 5, 52, 2])), 3);
    }
}
