//! How few queries over many keys are shared out over groups.

use mlx_rs::Dtype;

use crate::{
    kernel::{Constant, Launch, Plan},
    target::Target,
};

/// Simdgroups of a group, each of which takes keys of its own.
const SIMDS: i32 = 4;
/// Groups that run at once on a large GPU: 3 for each of 132 cores, which is what their registers leave room for.
const AT_ONCE: u64 = 132 * 3;
/// Times that many groups at most, for a part of the keys costs a result to write and to read.
const ROUNDS: u64 = 2;
/// Keys that a group works on at once, where it goes by tiles.
const KEYS_OF_STEP: u64 = 64;
/// Steps of a part at least, for the same reason.
const STEPS_OF_PART: u64 = 2;
/// So few steps are not split, for to launch what merges parts costs the host of an H200 some 20 µs.
const STEPS_OF_WHOLE: u64 = 16;
/// Lanes over which the results of parts are added up.
const MERGE_SIMDS: i32 = 4;
/// What stands for no bound of a window; above it stands how far one is. See `FAR` in `metal/common/attend.metal`.
const FAR: i32 = 1 << 30;

/// Which keys a query sees, and what becomes of its scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::attention) struct Rule {
    /// Not below zero.
    pub(in crate::attention) scale: f32,
    pub(in crate::attention) soft_cap: Option<f32>,
    /// Keys before the query's own place, and after it.
    pub(in crate::attention) window: [Option<i32>; 2],
    pub(in crate::attention) alibi: bool,
    pub(in crate::attention) sinks: bool,
}

/// What decides on a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attention) struct Shape {
    /// Sequences times heads of keys.
    pub(in crate::attention) pairs: i32,
    /// Query heads that share keys, times queries.
    pub(in crate::attention) rows: i32,
    /// The most keys of a sequence.
    pub(in crate::attention) keys: i32,
    pub(in crate::attention) size: i32,
    pub(in crate::attention) value_size: i32,
    /// Of queries.
    pub(in crate::attention) dtype: Dtype,
}

/// How the rows of a head and its keys are split up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attention) struct Split {
    by_tiles: bool,
    tiles: i32,
    /// Rows of a group.
    pub(in crate::attention) rows: i32,
    /// Parts of the keys.
    pub(in crate::attention) parts: i32,
}

impl Split {
    pub(in crate::attention) fn new(shape: Shape, target: Target) -> Self {
        // Apple's matrices have other shares for a lane, and nobody has measured there.
        let by_tiles = shape.dtype != Dtype::Float32 && target != Target::Metal;
        let tiles = tiles(by_tiles, shape);
        let rows = if by_tiles { 8 * tiles } else { tiles };
        let blocks = shape.rows.unsigned_abs().div_ceil(rows.unsigned_abs());
        let groups = u64::from(shape.pairs.unsigned_abs()) * u64::from(blocks);
        Self { by_tiles, tiles, rows, parts: parts(groups, shape.keys.unsigned_abs().into()) }
    }

    pub(in crate::attention) fn is_whole(self) -> bool {
        self.parts == 1
    }

    /// `SIMDS`, `BY_TILES` and the rest, in the order of [`CONSTANTS`].
    pub(in crate::attention) fn constants(self, shape: Shape, rule: &Rule) -> Vec<Constant> {
        let Rule { scale, soft_cap, window, alibi, sinks } = *rule;
        let to_powers_of_two = std::f32::consts::LOG2_E;
        let (rate, cap) = match soft_cap {
            Some(cap) => (scale / cap, cap * to_powers_of_two),
            None => (scale * to_powers_of_two, 0.0),
        };
        let [left, right] = window.map(reach);
        vec![
            Constant::Int(SIMDS),
            Constant::Bool(self.by_tiles),
            Constant::Int(self.tiles),
            Constant::Int(shape.size),
            Constant::Int(shape.value_size),
            Constant::Int(left),
            Constant::Int(right),
            Constant::Float(rate.min(f32::MAX)),
            Constant::Float(cap.min(f32::MAX)),
            Constant::Bool(alibi),
            Constant::Bool(sinks),
        ]
    }

    pub(in crate::attention) fn launch(self, groups: u32, shape: Shape) -> Launch {
        let floats = self.rows * shape.value_size + 2 * (SIMDS + 1) * self.rows;
        Launch {
            groups: [groups, self.parts.unsigned_abs(), 1],
            group: [(SIMDS * 32).unsigned_abs(), 1, 1],
            threadgroup_bytes: 4 * floats.unsigned_abs(),
        }
    }
}

/// The constants of a kernel that sweeps over blocks of keys.
#[rustfmt::skip]
pub(in crate::attention) const CONSTANTS_OVER_BLOCKS: &[&str] = &[
    "SIMDS", "BY_TILES", "TILES", "SIZE", "VALUE_SIZE", "LEFT", "RIGHT", "RATE", "CAP", "ALIBI", "SINKS", "BLOCK",
    "KEYS_SCALED", "VALUES_SCALED",
];

/// Those of one that sweeps over keys in one array.
pub(super) const CONSTANTS: &[&str] = CONSTANTS_OVER_BLOCKS.split_at(11).0;

/// A launch that merges `rows` rows; `inner` neighbours have the same head.
pub(super) fn merge(rows: i32, inner: i32, value_size: i32, sinks: bool) -> Plan {
    let launch = Launch {
        groups: [rows.unsigned_abs(), 1, 1],
        group: [(MERGE_SIMDS * 32).unsigned_abs(), 1, 1],
        threadgroup_bytes: (4 * MERGE_SIMDS * value_size).unsigned_abs(),
    };
    let constants = vec![
        Constant::Int(MERGE_SIMDS),
        Constant::Int(value_size),
        Constant::Int(inner),
        Constant::Bool(sinks),
    ];
    Plan { constants, extents: Vec::new(), launch }
}

/// Tiles of rows, or rows: as few as hold all, up to what registers are there.
fn tiles(by_tiles: bool, shape: Shape) -> i32 {
    let wide = shape.size.max(shape.value_size) > 128;
    match (by_tiles, shape.rows) {
        (true, ..=8) => 1,
        (true, _) if wide => 1,
        (true, _) => 2,
        (false, ..=1) => 1,
        (false, 2) => 2,
        (false, _) => 4,
    }
}

/// As many parts of the keys as keep all cores busy to the end: of those, the fewest.
fn parts(groups: u64, keys: u64) -> i32 {
    let steps = keys.div_ceil(KEYS_OF_STEP);
    if steps <= STEPS_OF_WHOLE {
        return 1;
    }
    let most = (steps / STEPS_OF_PART).min(ROUNDS * AT_ONCE / groups.max(1));
    // Parts are whole steps, so there may be fewer than were asked for.
    let found = (1..=most).map(|parts| steps.div_ceil(steps.div_ceil(parts)));
    let idle = |parts: u64| {
        let rounds = (groups * parts).div_ceil(AT_ONCE);
        // In twentieths, so that a gain too small to measure is none.
        20 - 20 * groups * parts / (rounds * AT_ONCE)
    };
    let best = found.min_by_key(|&parts| (idle(parts), parts));
    best.and_then(|parts| i32::try_from(parts).ok()).unwrap_or(1)
}

fn reach(bound: Option<i32>) -> i32 {
    bound.map_or(2 * (FAR - 1) + 1, |bound| FAR + bound.clamp(1 - FAR, FAR - 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Shape =
        Shape { pairs: 8, rows: 4, keys: 8192, size: 128, value_size: 128, dtype: Dtype::Bfloat16 };

    const RULE: Rule =
        Rule { scale: 0.5, soft_cap: None, window: [None, None], alibi: false, sinks: false };

    fn on_cuda(shape: Shape) -> Split {
        Split::new(shape, Target::Cuda)
    }

    #[test]
    fn keys_are_split_until_all_cores_are_busy() {
        for (pairs, keys, parts) in [(8, 8192, 43), (64, 8192, 6), (256, 4096, 3), (1, 8192, 64)] {
            let split = on_cuda(Shape { pairs, keys, ..LLAMA });
            assert_eq!(split.parts, parts, "{pairs} heads over {keys}");
        }
    }

    #[test]
    fn few_keys_or_many_heads_are_one_part() {
        assert!(on_cuda(Shape { keys: 1024, ..LLAMA }).is_whole());
        assert!(!on_cuda(Shape { keys: 1025, ..LLAMA }).is_whole());
        assert!(on_cuda(Shape { keys: 1, ..LLAMA }).is_whole());
        assert!(on_cuda(Shape { pairs: 4096, ..LLAMA }).is_whole());
        assert!(on_cuda(Shape { pairs: i32::MAX, rows: i32::MAX, ..LLAMA }).is_whole());
    }

    #[test]
    fn numbers_of_16_bits_go_by_tiles_but_on_metal() {
        assert!(on_cuda(LLAMA).by_tiles);
        assert!(!on_cuda(Shape { dtype: Dtype::Float32, ..LLAMA }).by_tiles);
        assert!(!Split::new(LLAMA, Target::Metal).by_tiles);
    }

    #[test]
    fn every_row_has_a_group() {
        for dtype in [Dtype::Float32, Dtype::Float16] {
            for rows in [1, 2, 3, 8, 9, 17, 64] {
                for size in [64, 256] {
                    let shape = Shape { rows, size, value_size: size, dtype, ..LLAMA };
                    let split = on_cuda(shape);
                    assert!((1..=16).contains(&split.rows), "{split:?}");
                    assert!(
                        split.launch(1, shape).check("decode", Target::Metal).is_ok(),
                        "{split:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_window_is_told_without_a_sign() {
        assert_eq!(reach(None), i32::MAX);
        assert_eq!(reach(Some(0)), FAR);
        for bound in [i32::MIN, -1, i32::MAX] {
            assert!((1..i32::MAX).contains(&reach(Some(bound))), "{bound}");
        }
    }

    #[test]
    fn constants_are_as_many_as_their_names() {
        let constants = on_cuda(LLAMA).constants(LLAMA, &RULE);
        assert_eq!(constants.len(), CONSTANTS.len());
        let capped = Rule { soft_cap: Some(f32::MAX), scale: f32::MAX, ..RULE };
        for constant in on_cuda(LLAMA).constants(LLAMA, &capped) {
            assert!(!matches!(constant, Constant::Float(bits) if !bits.is_finite()));
        }
    }
}
