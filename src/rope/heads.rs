//! How heads are shared out over threads: the geometry that `metal/common/heads.metal` reads.

use mlx_rs::{Array, Dtype, error::Result};

use crate::{kernel::Launch, layout::Layout, sizes::div_ceil};

/// What a thread has of a head, and of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Heads of one token for which its sines and cosines are computed once, at most.
    pub(super) heads: i32,
    /// Threads that share a head.
    pub(super) lanes: i32,
    /// Slots of a head, of two chunks each, that a thread holds.
    pub(super) rounds: i32,
}

impl Geometry {
    /// Threads of a group.
    const GROUP: i32 = 128;
    /// Threads of a simdgroup, on Apple GPUs and NVIDIA's alike.
    const SIMD: i32 = 32;
    /// Enough to make sines and cosines cheap.
    const HEADS: i32 = 16;

    /// For heads of `size` elements of which `dims` turn, and threads that know nothing of each other.
    pub(super) fn apart(dims: i32, size: i32, dtype: Dtype) -> Self {
        let slots = slots(dims, size, dtype);
        let lanes = slots.min(Self::SIMD);
        Self { heads: Self::HEADS, lanes, rounds: div_ceil(slots, lanes) }
    }

    /// The same for threads that add up what they have: those of a head stand in one simdgroup, and hold all of it.
    pub(super) fn together(dims: i32, size: i32, dtype: Dtype) -> Self {
        let slots = slots(dims, size, dtype);
        let lanes = slots.unsigned_abs().next_power_of_two().cast_signed().min(Self::SIMD);
        Self { heads: Self::HEADS, lanes, rounds: div_ceil(slots, lanes) }
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

    /// Simdgroups of a group.
    pub(super) const SIMDS: i32 = Self::GROUP / Self::SIMD;
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
#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: [(i32, i32); 9] = [
        (2, 2),
        (2, 7),
        (32, 80),
        (64, 64),
        (80, 80),
        (128, 128),
        (64, 256),
        (512, 512),
        (2, 4096),
    ];

    #[test]
    fn every_slot_of_a_head_has_a_thread() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            for (dims, size) in HEADS {
                let count = slots(dims, size, dtype);
                for geometry in
                    [Geometry::apart(dims, size, dtype), Geometry::together(dims, size, dtype)]
                {
                    assert!(geometry.lanes * geometry.rounds >= count, "{geometry:?} for {count}");
                    assert!((1..=32).contains(&geometry.lanes), "{geometry:?}");
                }
                let together = Geometry::together(dims, size, dtype);
                assert!(together.lanes.unsigned_abs().is_power_of_two(), "{together:?}");
            }
        }
    }

    #[test]
    fn a_usual_head_takes_a_quarter_of_a_simdgroup() {
        let geometry = Geometry::together(128, 128, Dtype::Bfloat16);
        assert_eq!(geometry, Geometry { heads: 16, lanes: 8, rounds: 1 });
        assert_eq!(geometry, Geometry::apart(128, 128, Dtype::Bfloat16));
        assert_eq!(Geometry::apart(80, 80, Dtype::Bfloat16).lanes, 5);
        assert_eq!(Geometry::together(80, 80, Dtype::Bfloat16).lanes, 8);
    }

    #[test]
    fn every_unit_has_its_threads() {
        let geometry = Geometry { heads: 4, lanes: 5, rounds: 1 };
        let heads = |shape: [i32; 4]| {
            let zeros = vec![0.0_f32; shape.iter().product::<i32>() as usize];
            Array::from_slice(&zeros, &shape)
        };
        assert_eq!(geometry.groups(&heads([1, 1, 1, 2])), 1);
        assert_eq!(geometry.groups(&heads([25, 4, 1, 2])), 1);
        assert_eq!(geometry.groups(&heads([25, 5, 1, 2])), 2);
        assert_eq!(geometry.groups(&heads([1, 5, 26, 2])), 3);
    }
}
