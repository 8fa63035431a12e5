//! What groups of simdgroups work on.

use mlx_rs::Dtype;

use super::problem::Problem;
use crate::{
    dispatch::{Backend, Dispatched},
    error::{Error, Result},
    kernel::{Constant, Launch, TILE, simds_for},
    sizes::{div_ceil, padded},
    target::Target,
};

/// Head sizes in whole tiles.
pub(super) fn padded_sizes(sizes: [i32; 2]) -> [i32; 2] {
    sizes.map(|size| padded(size, TILE))
}

/// How many of what a group works on, each of whose simdgroups has a tile of rows to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Simdgroups of a group.
    simds: i32,
    /// Rows of the other side in threadgroup memory at a time.
    staged: i32,
    /// Numbers between the rows there, so that their columns lie in different banks.
    pad: i32,
    /// Times that memory, so that the next rows arrive while these are worked on.
    pub(super) buffers: i32,
    bytes: i32,
}

impl Blocks {
    /// Threadgroup memory that the gradient of keys takes for each query beside the query itself, in bytes.
    pub(super) const OF_KEYS: i32 = 20;

    /// What fits besides `extra` bytes for each row in threadgroup memory, the best first.
    fn fitting(
        [size, value_size]: [i32; 2],
        dtype: Dtype,
        target: Target,
        buffers: i32,
        extra: i32,
    ) -> Result<Self> {
        let element = if dtype == Dtype::Float32 { 4 } else { 2 };
        let pad = 16 / element;
        let choices = [(32, pad, buffers), (16, pad, buffers), (16, pad, 1), (16, 0, 1)];
        let blocks = choices.map(|(staged, pad, buffers)| {
            let bytes = staged * (buffers * (size + value_size + 2 * pad) * element + extra);
            Self { simds: 1, staged, pad, buffers, bytes }
        });
        let limit = Launch::most_threadgroup_bytes(target).cast_signed();
        blocks.into_iter().find(|blocks| blocks.bytes <= limit).ok_or_else(too_large)
    }

    pub(super) fn forward(sizes: [i32; 2], dtype: Dtype, target: Target) -> Result<Self> {
        Self::fitting(sizes, dtype, target, 2, 0)
    }

    pub(super) fn backward(
        sizes: [i32; 2],
        dtype: Dtype,
        target: Target,
        extra: i32,
    ) -> Result<Self> {
        Self::fitting(sizes, dtype, target, 1, extra)
    }

    /// With simdgroups for `rows` rows, up to as many as run best at once.
    pub(super) fn for_rows(self, rows: i32) -> Self {
        Self { simds: simds_for(rows), ..self }
    }

    pub(super) fn constants(&self) -> Vec<Constant> {
        [self.simds, self.staged, self.pad].map(Constant::Int).to_vec()
    }

    pub(super) fn launch(&self, rows: i32, heads: i32, batch: i32) -> Launch {
        launch(self.simds, TILE * self.simds, self.bytes, [rows, heads, batch])
    }
}

/// What a group of two teams works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Teams {
    /// Of heads and values, in whole panels.
    pub(super) sizes: [i32; 2],
}

impl Teams {
    /// Simdgroups of a group.
    const SIMDS: i32 = 8;
    /// Of a group; as many keys and values are in its memory, half of them on their way.
    const ROWS: i32 = 128;
    /// Columns of a panel.
    const PANEL: i32 = 64;
    /// Beyond this neither registers nor threadgroup memory would let two groups share a core of a Hopper.
    const MAX_SIZE: i32 = 128;

    /// Where rows fill a group and a device has the memory; a host that acts out kernels for tests has.
    pub(super) fn of(sizes: [i32; 2], dtype: Dtype, target: Target, rows: i32) -> Option<Self> {
        let fits = dtype != Dtype::Float32 && sizes.into_iter().all(|size| size <= Self::MAX_SIZE);
        let pays = fits && rows >= Self::ROWS && target != Target::Metal;
        pays.then(|| Self { sizes: sizes.map(|size| padded(size, Self::PANEL)) })
    }

    pub(super) fn launch(self, rows: i32, heads: i32, batch: i32) -> Launch {
        let [size, value_size] = self.sizes;
        let bytes = 2 * Self::ROWS * (2 * size + value_size);
        launch(Self::SIMDS, Self::ROWS, bytes, [rows, heads, batch])
    }
}

fn launch(simds: i32, rows_of_group: i32, bytes: i32, [rows, heads, batch]: [i32; 3]) -> Launch {
    Launch {
        groups: [div_ceil(rows, rows_of_group), heads, batch].map(i32::unsigned_abs),
        group: [32 * simds.unsigned_abs(), 1, 1],
        threadgroup_bytes: bytes.unsigned_abs(),
    }
}

fn too_large() -> Error {
    let (op, backend) = (Problem::OP, Backend::Kernel);
    Error::Unavailable { op, backend, reason: "its heads exceed threadgroup memory".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [i32; 5] = [16, 64, 128, 192, 256];

    #[test]
    fn threadgroup_memory_suffices_for_every_head() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            for sizes in SIZES.iter().flat_map(|&size| SIZES.map(|value_size| [size, value_size])) {
                assert!(Blocks::forward(sizes, dtype, Target::Metal).is_ok(), "{sizes:?}");
                let backward = Blocks::backward(sizes, dtype, Target::Metal, Blocks::OF_KEYS);
                let too_much = dtype == Dtype::Float32 && sizes == [256, 256];
                assert_eq!(backward.is_err(), too_much, "{sizes:?}");
            }
        }
    }

    #[test]
    fn few_rows_take_few_simdgroups() -> Result<()> {
        for (rows, simds) in [(1, 1), (16, 1), (17, 2), (64, 4), (65, 4), (5000, 4)] {
            let blocks = Blocks::forward([64, 64], Dtype::Float16, Target::Metal)?.for_rows(rows);
            assert_eq!(blocks.simds, simds, "{rows}");
        }
        Ok(())
    }

    #[test]
    fn teams_have_many_rows_of_small_heads_in_half_precision() {
        let of = |sizes, dtype, target, rows| Teams::of(sizes, dtype, target, rows);
        let sizes = |sizes| Some(Teams { sizes });
        assert_eq!(of([80, 1], Dtype::Bfloat16, Target::Cuda, 128), sizes([128, 64]));
        assert_eq!(of([64, 128], Dtype::Float16, Target::Cpu, 4096), sizes([64, 128]));
        for (size, dtype, target, rows) in [
            (128, Dtype::Bfloat16, Target::Cuda, 127),
            (129, Dtype::Bfloat16, Target::Cuda, 4096),
            (64, Dtype::Float32, Target::Cuda, 4096),
            (64, Dtype::Bfloat16, Target::Metal, 4096),
        ] {
            assert_eq!(
                of([size, 64], dtype, target, rows),
                None,
                "{size} {dtype:?} {target:?} {rows}"
            );
        }
    }

    #[test]
    fn every_group_of_teams_has_the_memory_that_its_text_takes() {
        for (sizes, bytes) in [([128, 128], 98_304), ([64, 64], 49_152), ([64, 128], 65_536)] {
            let launch = Teams { sizes }.launch(4096, 32, 4);
            assert_eq!((launch.groups, launch.group), ([32, 32, 4], [256, 1, 1]));
            assert_eq!(launch.threadgroup_bytes, bytes, "{sizes:?}");
            assert!(bytes <= Launch::most_large_threadgroup_bytes(Target::Cuda));
        }
    }

    #[test]
    fn groups_cover_every_row() -> Result<()> {
        let blocks = Blocks::forward([64, 64], Dtype::Float16, Target::Metal)?.for_rows(129);
        assert_eq!(blocks.launch(129, 6, 2).groups, [3, 6, 2]);
        assert_eq!(blocks.launch(128, 6, 2).groups, [2, 6, 2]);
        assert_eq!(Teams { sizes: [64, 64] }.launch(129, 6, 2).groups, [2, 6, 2]);
        Ok(())
    }
}
