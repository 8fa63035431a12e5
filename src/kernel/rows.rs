//! How rows are shared out over threads: the geometry that `metal/common/row.metal` reads.

use mlx_rs::{Array, Dtype};

use super::{Constant, Launch};

/// Rows over the last axis, each worked on by one or more simdgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Simdgroups that share a row.
    pub(crate) simds: i32,
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
    /// Rows of a group whose simdgroups work alone.
    const ROWS_PER_GROUP: i32 = 8;
    /// Few enough that a group can be launched whatever registers its threads take: NVIDIA's compiler gives each up to
    /// 255 of a core's 65536, and does not know the size of a group.
    const MAX_SIMDS: i32 = 8;

    /// `rows` rows of `length` elements.
    pub(crate) fn new(rows: i32, length: i32, dtype: Dtype) -> Self {
        let chunks = length.div_ceil_to(Self::CHUNK / bytes_of(dtype));
        let wanted = chunks.div_ceil_to(Self::SIMD * Self::CHUNKS_WANTED);
        let simds = wanted.min(Self::MAX_SIMDS);
        Self { simds, chunks: chunks.div_ceil_to(Self::SIMD * simds), rows }
    }

    /// The rows of a matrix, `[N, D]`; of nothing where it is none.
    pub(crate) fn of(matrix: &Array) -> Self {
        match *matrix.shape() {
            [rows, length] => Self::new(rows.max(1), length.max(1), matrix.dtype()),
            _ => Self::new(1, 1, matrix.dtype()),
        }
    }

    /// The `SIMDS` and `CHUNKS` of a kernel.
    pub(crate) fn constants(&self) -> [Constant; 2] {
        [Constant::Int(self.simds), Constant::Int(self.chunks)]
    }

    /// A launch with one row for each group, or for each simdgroup where one is enough for a row.
    pub(crate) fn launch(&self, threadgroup_bytes: u32) -> Launch {
        self.launch_of(self.rows, threadgroup_bytes)
    }

    /// A launch that works on `workers` rows at once, rounded up to full groups, and goes on to further rows.
    pub(crate) fn launch_of(&self, workers: i32, threadgroup_bytes: u32) -> Launch {
        let at_once = self.rows_per_group();
        let groups = workers.div_ceil_to(at_once);
        let threads = Self::SIMD * if self.simds == 1 { at_once } else { self.simds };
        Launch {
            groups: [groups.unsigned_abs(), 1, 1],
            group: [threads.unsigned_abs(), 1, 1],
            threadgroup_bytes,
        }
    }

    /// Rows that [`Rows::launch_of`] really works on at once: `workers` rounded up to full groups.
    pub(crate) fn at_once(&self, workers: i32) -> i32 {
        workers.div_ceil_to(self.rows_per_group()) * self.rows_per_group()
    }

    fn rows_per_group(&self) -> i32 {
        if self.simds == 1 { Self::ROWS_PER_GROUP } else { 1 }
    }
}

/// Division of counts above zero, rounded up.
trait DivCeil {
    fn div_ceil_to(self, by: Self) -> Self;
}

impl DivCeil for i32 {
    fn div_ceil_to(self, by: Self) -> Self {
        (self - 1) / by + 1
    }
}

fn bytes_of(dtype: Dtype) -> i32 {
    if dtype == Dtype::Float32 { 4 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [i32; 16] =
        [1, 7, 8, 9, 63, 64, 65, 255, 512, 1000, 1023, 1024, 1025, 4096, 8192, 131_072];

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
    fn every_row_has_a_group() {
        for count in [1, 7, 8, 9, 1000] {
            for length in LENGTHS {
                let rows = Rows::new(count, length, Dtype::Float16);
                let launch = rows.launch(128);
                assert!(launch.check("rows").is_ok(), "{launch:?}");
                let simds = launch.groups[0] * launch.group[0] / 32;
                assert!(simds >= (count * rows.simds).unsigned_abs(), "{launch:?}");
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
    fn workers_fill_their_groups() {
        let short = Rows::new(100, 64, Dtype::Float16);
        assert_eq!((short.at_once(12), short.launch_of(12, 0).groups[0]), (16, 2));
        let long = Rows::new(100, 4096, Dtype::Float16);
        assert_eq!((long.at_once(12), long.launch_of(12, 0).groups[0]), (12, 12));
    }
}
