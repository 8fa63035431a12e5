//! Positions as numbers added to the scores.
//!
//! Each bias is a mask of [`flash_attention`](super::flash_attention): floats that broadcast to `[B, H, S_q, S_kv]`.

mod alibi;
mod module;
mod relative_position;

pub use alibi::{AlibiBiasOptions, alibi_bias, alibi_slopes};
pub use module::{RelativePositionBias, RelativePositionBiasBuilder, RelativePositionBiasInput};
pub use relative_position::{RelativePositionBucketOptions, relative_position_bucket};

use mlx_rs::{Array, ops::arange};

use crate::{check::Check, error::Result};

/// Positions up to here are exact in f32, and far from the ends of the integers they are counted in.
const FARTHEST: i32 = 1 << 24;

/// How many queries stand before how many keys, and where the first query stands.
#[derive(Debug, Clone, Copy)]
struct Span {
    queries: i32,
    keys: i32,
    offset: i32,
}

impl Span {
    /// The last query stands at the last key, unless `offset` says where the first one does.
    fn new(check: Check, queries: i32, keys: i32, offset: Option<i32>) -> Result<Self> {
        let expected = format_args!("be from 0 to {FARTHEST}");
        for (name, length) in [("query_length", queries), ("key_length", keys)] {
            check.value((0..=FARTHEST).contains(&length), name, expected, length)?;
        }
        let offset = offset.unwrap_or(keys - queries);
        let expected = format_args!("be from -{FARTHEST} to {FARTHEST}");
        check.value((-FARTHEST..=FARTHEST).contains(&offset), "offset", expected, offset)?;
        Ok(Self { queries, keys, offset })
    }

    /// How far each key stands behind each query's own position: `[S_q, S_kv]`, int32.
    fn relative_positions(self) -> Result<Array> {
        let Self { queries, keys, offset } = self;
        let keys = arange::<_, i32>(None, keys, None)?;
        let queries = arange::<_, i32>(offset, offset + queries, None)?;
        Ok(keys.subtract(queries.expand_dims(-1)?)?)
    }
}
