//! How rows are shared out over threads: the geometry that `metal/common/row.metal` reads.

use mlx_rs::{Array, Dtype};

use super::{Constant, Launch};
use crate::sizes::{div_ceil, padded};

/// Rows over the last axis, each worked on by one or more simdgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Simdgroups that share a row.
    pub(crate) simds: i32,
    /// Lanes of a simdgroup that share a row, where one simdgroup is enough for it.
    pub(crate) lanes: i32,
    /// Chunks of 16 bytes that a thread holds.
    pub(crate) chunks: i32,
    rows: i32,
}

impl Rows {
    /// Threads of a simdgroup, on Apple GPUs and NVIDIA's alike.
    const SIMD: i32 = 32;
    /// Bytes that a thread loads at once.
    const CHUNK: i32 = 16;
    /// Chunks that a thread should hold: enough to have loads in flight, few enough for its registers.
    const CHUNKS_WANTED: i32 = 2;
    /// Simdgroups of a group that work alone.
    const SIMDS_ALONE: i32 = 8;
    /// Few enough that a group can be launched whatever registers its threads take: NVIDIA's compiler gives each up to
    /// 255 of a core's 65536, and does not know the size of a group.
    const MAX_SIMDS: i32 = 8;
    /// The fewest lanes of a row: with fewer there would be more kernels to compile, for rows that take no time anyway.
    const MIN_LANES: i32 = 8;
    /// Threads that keep a large GPU busy, where each works on many rows: 512 for each of 132 cores.
    const BUSY: i32 = 132 * 512;
    /// Rows of a worker at least: what it adds up for them is as much to write and read as a row or two.
    const ROWS_OF_WORKER: i32 = 2;

    /// So that threads can be counted in an `i32`: the shortest row may have a simdgroup.
    const MOST: usize = 1 << 25;

    /// Why no kernel over the rows of an array can take it, if none can.
    pub(crate) fn refusal(x: &Array) -> Option<&'static str> {
        let length = x.shape().last().map_or(1, |&length| length.unsigned_abs() as usize);
        super::refusal([x]).or_else(|| {
            let fits = x.size() / length.max(1) <= Self::MOST;
            (!fits).then_some("the kernel takes no more than 2^25 rows")
        })
    }

    /// `rows` rows of `length` elements.
    pub(crate) fn new(rows: i32, length: i32, dtype: Dtype) -> Self {
        let chunks = div_ceil(length, Self::CHUNK / bytes_of(dtype));
        let wanted = div_ceil(chunks, Self::SIMD * Self::CHUNKS_WANTED);
        let simds = wanted.min(Self::MAX_SIMDS);
        let lanes = Self::SIMD;
        Self { simds, lanes, chunks: div_ceil(chunks, lanes * simds), rows }
    }

    /// The same, but short rows share a simdgroup, so that none of its lanes idle.
    pub(crate) fn packed(rows: i32, length: i32, dtype: Dtype) -> Self {
        let loose = Self::new(rows, length, dtype);
        let chunks = div_ceil(length, Self::CHUNK / bytes_of(dtype));
        let wanted = div_ceil(chunks, Self::CHUNKS_WANTED).unsigned_abs().next_power_of_two();
        match i32::try_from(wanted) {
            Ok(wanted) if wanted < Self::SIMD => {
                let lanes = wanted.max(Self::MIN_LANES);
                Self { lanes, chunks: div_ceil(chunks, lanes), ..loose }
            }
            _ => loose,
        }
    }

    /// The same with as many chunks a thread, and so fewer threads a row: what a group waits for, at its barriers, more
    /// groups of a core then wait for at different times. For kernels with the registers for it.
    pub(crate) fn holding(self, chunks: i32) -> Self {
        if self.simds == 1 {
            return self;
        }
        let all = self.simds * self.chunks;
        let simds = div_ceil(all, chunks).min(Self::MAX_SIMDS);
        Self { simds, chunks: div_ceil(all, simds), ..self }
    }

    /// The rows of a matrix, `[N, D]`; of nothing where it is none.
    pub(crate) fn of(matrix: &Array) -> Self {
        match *matrix.shape() {
            [rows, length] => Self::new(rows.max(1), length.max(1), matrix.dtype()),
            _ => Self::new(1, 1, matrix.dtype()),
        }
    }

    /// The `SIMDS`, `LANES` and `CHUNKS` of a kernel.
    pub(crate) fn constants(&self) -> [Constant; 3] {
        [Constant::Int(self.simds), Constant::Int(self.lanes), Constant::Int(self.chunks)]
    }

    /// Rows to work on at once, each thread going on to further rows: enough to keep a GPU busy where there are `sets`
    /// of these rows, and few enough that there are further rows.
    pub(crate) fn workers(&self, sets: i32) -> i32 {
        let threads = self.simds * self.lanes;
        (Self::BUSY / threads / sets).clamp(1, div_ceil(self.rows, Self::ROWS_OF_WORKER))
    }

    /// A launch with one row for each group, or for each simdgroup or part of one where that is enough for a row.
    pub(crate) fn launch(&self, threadgroup_bytes: u32) -> Launch {
        self.launch_of(self.rows, threadgroup_bytes)
    }

    /// A launch that works on `workers` rows at once, rounded up to full groups, and goes on to further rows.
    pub(crate) fn launch_of(&self, workers: i32, threadgroup_bytes: u32) -> Launch {
        let at_once = self.rows_per_group();
        let groups = div_ceil(workers, at_once);
        let threads = self.simds * self.lanes * at_once;
        Launch {
            groups: [groups.unsigned_abs(), 1, 1],
            group: [threads.unsigned_abs(), 1, 1],
            threadgroup_bytes,
        }
    }

    /// Rows that [`Rows::launch_of`] really works on at once: `workers` rounded up to full groups.
    pub(crate) fn at_once(&self, workers: i32) -> i32 {
        padded(workers, self.rows_per_group())
    }

    fn rows_per_group(&self) -> i32 {
        if self.simds == 1 { Self::SIMDS_ALONE * (Self::SIMD / self.lanes) } else { 1 }
    }
}

/// Division of counts above zero, rounded up.
fn bytes_of(dtype: Dtype) -> i32 {
    if dtype == Dtype::Float32 { 4 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    const LENGTHS: [i32; 16] =
        [1, 7, 8, 9, 63, 64, 65, 255, 512, 1000, 1023, 1024, 1025, 4096, 8192, 131_072];

    #[test]
    fn threads_of_all_rows_can_be_counted() -> mlx_rs::error::Result<()> {
        // Nothing is computed of it.
        let rows = |count: i32| mlx_rs::ops::zeros::<f32>(&[count, 4]);
        assert_eq!(Rows::refusal(&rows(1 << 25)?), None);
        let refused = Rows::refusal(&rows((1 << 25) + 1)?);
        assert_eq!(refused, Some("the kernel takes no more than 2^25 rows"));
        Ok(())
    }

    #[test]
    fn every_element_of_a_row_has_a_thread() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            for length in LENGTHS {
                let rows = Rows::new(3, length, dtype);
                let held = rows.simds * 32 * rows.chunks * 16 / bytes_of(dtype);
                assert!(held >= length, "{rows:?} for {length}");
                assert!((1..=8).contains(&rows.simds), "{rows:?}");
            }
        }
    }

    #[test]
    fn packed_rows_leave_few_lanes_idle() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            for length in LENGTHS {
                let (rows, loose) = (Rows::packed(3, length, dtype), Rows::new(3, length, dtype));
                let held = rows.simds * rows.lanes * rows.chunks * 16 / bytes_of(dtype);
                assert!(held >= length, "{rows:?} for {length}");
                assert!(rows == loose || (rows.lanes < 32 && rows.simds == 1), "{rows:?}");
                assert!(rows.lanes.unsigned_abs().is_power_of_two(), "{rows:?}");
                let least = 8 * 16 / bytes_of(dtype);
                assert!(rows.lanes == 32 || held <= least.max(2 * length), "{rows:?} for {length}");
            }
        }
        assert_eq!(Rows::packed(9, 128, Dtype::Bfloat16).constants(), [1, 8, 2].map(Constant::Int));
    }

    #[test]
    fn workers_have_rows_to_go_on_to() {
        let wide = Rows::packed(16384, 4096, Dtype::Bfloat16);
        assert_eq!((wide.workers(1), wide.workers(4)), (264, 66));
        assert_eq!(Rows::packed(3, 4096, Dtype::Bfloat16).workers(1), 2);
        assert_eq!(Rows::packed(1, 4096, Dtype::Bfloat16).workers(1), 1);
        assert_eq!(wide.workers(i32::MAX), 1);
    }

    #[test]
    fn every_row_has_a_group() {
        for count in [1, 7, 8, 9, 1000] {
            for length in LENGTHS {
                for make in [Rows::new, Rows::packed] {
                    let rows = make(count, length, Dtype::Float16);
                    let launch = rows.launch(128);
                    assert!(launch.check("rows", Target::Metal).is_ok(), "{launch:?}");
                    let threads = launch.groups[0] * launch.group[0];
                    let needed = (count * rows.simds * rows.lanes).unsigned_abs();
                    assert!(threads >= needed, "{launch:?}");
                }
            }
        }
    }

    #[test]
    fn short_rows_share_a_group() {
        assert_eq!(Rows::new(100, 64, Dtype::Float16).launch(0).group, [256, 1, 1]);
        assert_eq!(Rows::new(100, 64, Dtype::Float16).launch(0).groups, [13, 1, 1]);
        assert_eq!(Rows::new(100, 4096, Dtype::Float16).launch(0).groups, [100, 1, 1]);
    }

    #[test]
    fn threads_that_hold_more_are_fewer() {
        for length in LENGTHS {
            let rows = Rows::new(3, length, Dtype::Bfloat16);
            let deep = rows.holding(4);
            assert!(deep.simds <= rows.simds && deep.simds >= 1, "{deep:?}");
            assert!(deep.simds * deep.chunks >= rows.simds * rows.chunks, "{deep:?}");
        }
        let deep = Rows::new(3, 4096, Dtype::Bfloat16).holding(4);
        assert_eq!((deep.simds, deep.chunks), (4, 4));
    }

    #[test]
    fn workers_fill_their_groups() {
        let short = Rows::new(100, 64, Dtype::Float16);
        assert_eq!((short.at_once(12), short.launch_of(12, 0).groups[0]), (16, 2));
        let long = Rows::new(100, 4096, Dtype::Float16);
        assert_eq!((long.at_once(12), long.launch_of(12, 0).groups[0]), (12, 12));
    }
}
