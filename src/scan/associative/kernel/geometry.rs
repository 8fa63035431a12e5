//! How a scan is shared out over threads.

use mlx_rs::{Array, Dtype};

use crate::{
    kernel::{Constant, Launch},
    sizes::div_ceil,
};

/// Threads of a simdgroup, on Apple GPUs and NVIDIA's alike.
const SIMD: i32 = 32;
/// The most simdgroups that scan one tile.
const SIMDS: i32 = 8;
/// Simdgroups that find what a piece does as a whole: each has few loads under way.
const SIMDS_OF_TOTALS: i32 = 16;
/// Steps of time that a thread takes at once, of f32; of 16 bits, that many pairs of elements.
const STEPS: i32 = 8;
/// Runs of 16 bytes that a thread takes at once, of rows: with two, an H200 takes a sixth longer.
const CHUNKS: i32 = 1;
/// Simdgroups of a group, where each scans a row by itself.
const TEAMS: i32 = 8;
/// The longest axis that is never cut into pieces, and the least that is worth one.
const WORTH_A_PIECE: i32 = 1024;
/// Groups that keep a GPU busy.
const ENOUGH_GROUPS: i32 = 256;

/// Arrays `[O, L, I]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) outer: i32,
    length: i32,
    inner: i32,
    /// Elements of 16 bytes.
    run: i32,
}

impl Geometry {
    pub(super) fn of(x: &Array) -> Self {
        let run = if x.dtype() == Dtype::Float32 { 4 } else { 8 };
        Self { outer: x.dim(0), length: x.dim(1), inner: x.dim(2), run }
    }

    /// Whether the scanned axis is the last in memory.
    pub(super) fn in_rows(&self) -> bool {
        self.inner == 1
    }

    /// Neighbouring channels that a thread takes and loads at once: two where that leaves enough groups.
    fn width(&self) -> i32 {
        let pairs = self.inner % 2 == 0 && self.groups_of(2) >= ENOUGH_GROUPS;
        if pairs { 2 } else { 1 }
    }

    /// Steps of time that a thread takes at once.
    fn steps(&self) -> i32 {
        if self.in_halves() && self.width() == 1 { 2 * STEPS } else { STEPS }
    }

    /// Tiles that are loaded before their turn: on an H200 a second one is worth a sixth in f32, and costs a ninth in 16
    /// bits, whose tiles have more steps.
    fn ahead(&self) -> i32 {
        if self.in_halves() { 1 } else { 2 }
    }

    /// Whether elements have 16 bits.
    fn in_halves(&self) -> bool {
        self.run == 8
    }

    /// Simdgroups that share a tile.
    fn simds(&self) -> i32 {
        let unit = if self.in_rows() { SIMD * self.run } else { self.steps() };
        let wanted = div_ceil(self.length, unit);
        (wanted.unsigned_abs().next_power_of_two().min(SIMDS.unsigned_abs())).cast_signed()
    }

    /// Groups for one piece of all rows.
    fn groups(&self) -> i32 {
        if self.in_rows() { self.outer } else { self.groups_of(self.width()) }
    }

    /// Groups for one piece of all columns, where a thread takes `width` channels.
    fn groups_of(&self, width: i32) -> i32 {
        self.outer.saturating_mul((self.inner - 1) / (SIMD * width) + 1)
    }

    /// How many pieces a long axis with so many segments is cut into besides: as many as leave no core of a GPU idle.
    pub(super) fn pieces(&self, segments: i32) -> i32 {
        let groups = self.groups().saturating_mul(segments);
        if self.length <= WORTH_A_PIECE || groups > ENOUGH_GROUPS / 2 {
            return 1;
        }
        (ENOUGH_GROUPS / groups).min(div_ceil(self.length, WORTH_A_PIECE))
    }

    /// The constants that say it, and the launch.
    pub(super) fn plan(&self, pieces: i32) -> (Vec<Constant>, Launch) {
        if self.in_rows() {
            return self.plan_of_rows(pieces, self.simds());
        }
        let (width, steps) = (self.width(), self.steps());
        let (mut constants, launch) = self.plan_of_columns(pieces, self.simds(), width, steps);
        constants.push(Constant::Int(self.ahead()));
        (constants, launch)
    }

    /// The same for gradients, which need more registers a step.
    pub(super) fn plan_backward(&self, pieces: i32) -> (Vec<Constant>, Launch) {
        match self.in_rows() {
            true => self.plan_of_rows(pieces, self.simds()),
            false => self.plan_of_columns(pieces, self.simds(), self.width(), STEPS),
        }
    }

    /// The same for what pieces do as a whole, for which a thread loads 4 bytes at once if it can.
    pub(super) fn plan_totals(&self, pieces: i32) -> (Vec<Constant>, Launch) {
        match self.in_rows() {
            true => {
                let (_, launch) = self.plan_of_rows(pieces, 1);
                (Vec::new(), Launch { threadgroup_bytes: 0, ..launch })
            }
            false => {
                let width = if self.in_halves() && self.inner % 2 == 0 { 2 } else { 1 };
                self.plan_of_columns(pieces, SIMDS_OF_TOTALS, width, STEPS)
            }
        }
    }

    fn plan_of_rows(&self, pieces: i32, simds: i32) -> (Vec<Constant>, Launch) {
        let teams = self.outer.saturating_mul(pieces);
        let (groups, in_group) =
            if simds == 1 { (div_ceil(teams, TEAMS), TEAMS) } else { (teams, simds) };
        let launch = launch(groups, in_group, 16 * CHUNKS * simds);
        (vec![Constant::Int(simds), Constant::Int(CHUNKS)], launch)
    }

    fn plan_of_columns(
        &self,
        pieces: i32,
        simds: i32,
        width: i32,
        steps: i32,
    ) -> (Vec<Constant>, Launch) {
        let groups = self.groups_of(width).saturating_mul(pieces);
        let launch = launch(groups, simds, 512 * simds * width);
        (vec![Constant::Int(simds), Constant::Int(width), Constant::Int(steps)], launch)
    }
}

fn launch(groups: i32, simds: i32, bytes: i32) -> Launch {
    Launch {
        groups: [groups.unsigned_abs(), 1, 1],
        group: [(simds * SIMD).unsigned_abs(), 1, 1],
        threadgroup_bytes: bytes.unsigned_abs(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    const fn geometry(outer: i32, length: i32, inner: i32, run: i32) -> Geometry {
        Geometry { outer, length, inner, run }
    }

    #[test]
    fn few_long_rows_are_cut_into_pieces() {
        for (geometry, pieces) in [
            (geometry(4, 2048, 2048, 4), 1),
            (geometry(1, 65536, 256, 4), 32),
            (geometry(1, 65536, 1, 4), 64),
            (geometry(1, 1024, 1, 4), 1),
            (geometry(1, 1025, 1, 4), 2),
            (geometry(1000, 65536, 1, 8), 1),
            (geometry(i32::MAX, 65536, 65536, 8), 1),
        ] {
            assert_eq!(geometry.pieces(1), pieces, "{geometry:?}");
        }
        assert_eq!(geometry(1, 65536, 256, 4).pieces(4), 8);
        assert_eq!(geometry(1, 65536, 256, 4).pieces(40), 1);
    }

    #[test]
    fn every_channel_and_row_has_a_group() {
        for (outer, inner, run) in
            [(1, 1, 4), (7, 1, 8), (3, 33, 4), (3, 66, 8), (300, 64, 8), (999, 66, 4)]
        {
            for length in [1, 8, 9, 100, 5000] {
                for pieces in [1, 3] {
                    let geometry = geometry(outer, length, inner, run);
                    let plans = [
                        geometry.plan(pieces),
                        geometry.plan_backward(pieces),
                        geometry.plan_totals(pieces),
                    ];
                    for (constants, launch) in plans {
                        assert!(launch.check("scan", Target::Metal).is_ok(), "{launch:?}");
                        let simds = (launch.groups[0] * launch.group[0] / 32).cast_signed();
                        let work = match geometry.in_rows() {
                            true => outer * pieces,
                            false => {
                                let Constant::Int(width) = constants[1] else { unreachable!() };
                                assert_eq!(inner % width, 0);
                                outer * pieces * ((inner - 1) / (32 * width) + 1)
                            }
                        };
                        assert!(simds >= work, "{geometry:?}: {launch:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn short_axes_take_few_simdgroups() {
        assert_eq!([1, 8, 9, 40, 1000].map(|n| geometry(1, n, 64, 4).simds()), [1, 1, 2, 8, 8]);
        assert_eq!([1, 128, 129, 2000].map(|n| geometry(1, n, 1, 4).simds()), [1, 1, 2, 8]);
    }

    #[test]
    fn threads_take_pairs_of_channels_where_there_are_many() {
        let wide = |outer, inner, run| {
            let geometry = geometry(outer, 2048, inner, run);
            (geometry.width(), geometry.steps(), geometry.ahead())
        };
        assert_eq!(wide(8, 2048, 4), (2, 8, 2));
        assert_eq!(wide(8, 2048, 8), (2, 8, 1));
        assert_eq!(wide(4, 2048, 4), (1, 8, 2));
        assert_eq!(wide(4, 2048, 8), (1, 16, 1));
        assert_eq!(wide(1000, 2047, 8), (1, 16, 1));
    }
}
