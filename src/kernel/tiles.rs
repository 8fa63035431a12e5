//! How kernels cut rows and columns into the tiles of `metal/common/tile.metal`.

use crate::sizes::div_ceil;

/// Rows and columns of a tile.
pub(crate) const TILE: i32 = 16;

/// Simdgroups of a group: with 8 attention takes a fifth longer on an H200.
const MAX_SIMDS: i32 = 4;

/// How many simdgroups, each with a tile of rows to itself, work on `rows` rows: a power of two, and no more than run best at
/// once.
pub(crate) fn simds_for(rows: i32) -> i32 {
    let needed = div_ceil(rows, TILE).unsigned_abs();
    needed.next_power_of_two().cast_signed().min(MAX_SIMDS)
}
