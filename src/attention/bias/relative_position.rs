//! The buckets of T5's relative positions.

use mlx_rs::{
    Array, Dtype,
    ops::{clip, zeros_dtype},
};

use crate::{check::Check, error::Result, uploads};

/// Options of [`relative_position_bucket`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelativePositionBucketOptions {
    /// Whether keys ahead of the query have buckets of their own, half of all; otherwise all of them fall into
    /// bucket 0. Default: `true`.
    pub bidirectional: bool,
    /// How many buckets there are, from 2; for both directions an even number from 4. Default: 32.
    pub num_buckets: i32,
    /// From this distance on all share the last bucket: more than the exact buckets of a direction and at most
    /// 2^20. Default: 128.
    pub max_distance: i32,
}

impl RelativePositionBucketOptions {
    /// The default of [`RelativePositionBucketOptions::num_buckets`].
    pub const DEFAULT_NUM_BUCKETS: i32 = 32;

    /// The default of [`RelativePositionBucketOptions::max_distance`].
    pub const DEFAULT_MAX_DISTANCE: i32 = 128;
}

impl Default for RelativePositionBucketOptions {
    fn default() -> Self {
        Self {
            bidirectional: true,
            num_buckets: Self::DEFAULT_NUM_BUCKETS,
            max_distance: Self::DEFAULT_MAX_DISTANCE,
        }
    }
}

const FARTHEST: i32 = 1 << 20;

impl RelativePositionBucketOptions {
    pub(super) fn check(&self, check: Check) -> Result<()> {
        let (least, expected) = match self.bidirectional {
            true => (4, "be even and at least 4"),
            false => (2, "be at least 2"),
        };
        let even = !self.bidirectional || self.num_buckets % 2 == 0;
        let enough = even && self.num_buckets >= least;
        check.value(enough, "num_buckets", expected, self.num_buckets)?;
        let exact = self.exact();
        let known = self.max_distance > exact && self.max_distance <= FARTHEST;
        let expected = format_args!("be above {exact} and at most {FARTHEST}");
        check.value(known, "max_distance", expected, self.max_distance)
    }

    /// How many buckets one direction has.
    fn of_a_direction(&self) -> i32 {
        if self.bidirectional { self.num_buckets / 2 } else { self.num_buckets }
    }

    /// How many of them hold a single distance.
    fn exact(&self) -> i32 {
        self.of_a_direction() / 2
    }

    /// The bucket of each distance up to the largest, within its direction.
    ///
    /// A logarithm that is a whole number must not be rounded below it, whatever the device, so they are taken here.
    fn buckets(&self) -> Vec<i32> {
        const ROUNDING: f64 = 1e-9;
        let (exact, all) = (self.exact(), self.of_a_direction());
        let per_octave =
            f64::from(all - exact) / (f64::from(self.max_distance) / f64::from(exact)).ln();
        let shared = |distance: i32| {
            let past = (f64::from(distance) / f64::from(exact)).ln() * per_octave;
            (exact + (past + ROUNDING) as i32).min(all - 1)
        };
        (0..=self.max_distance).map(|d| if d < exact { d } else { shared(d) }).collect()
    }
}

/// The bucket that T5 puts each relative position into.
///
/// With `r` the position of the key less that of the query and `n` buckets, where both directions are told apart
/// `n` is half of all, keys ahead (`r > 0`) have `n` added to their bucket, and the distance is `d = |r|`; otherwise
/// `d = max(−r, 0)`. With `e = n / 2`, rounded down, the bucket is `d` for `d < e`, and else
/// `min(n − 1, e + floor((n − e) · ln(d / e) / ln(max_distance / e)))`.
///
/// # Shapes
/// - `relative_positions`: `[...]`, signed or unsigned integers
/// - result: `[...]`, int32
///
/// # Errors
/// When `relative_positions` holds no integers, or when the number of buckets or the distance is outside its range.
///
/// # Example
/// ```
/// use mlx_primitives::attention::relative_position_bucket;
/// use mlx_rs::array;
///
/// let buckets = relative_position_bucket(&array!([-200, -8, -1, 0, 1, 8, 200]), Default::default())?;
/// assert!(buckets.all_close(array!([15, 8, 1, 0, 17, 24, 31]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// A look-up in a table of `max_distance + 1` integers, computed on the host in f64, so that every device agrees.
///
/// Raffel et al., [Exploring the Limits of Transfer Learning with a Unified Text-to-Text
/// Transformer](https://arxiv.org/abs/1910.10683), 2019.
pub fn relative_position_bucket(
    relative_positions: impl AsRef<Array>,
    options: RelativePositionBucketOptions,
) -> Result<Array> {
    let positions = relative_positions.as_ref();
    let check = Check::op("relative_position_bucket");
    check.integer("relative_positions", positions)?;
    options.check(check)?;
    buckets_of(positions, &options)
}

/// [`relative_position_bucket`] of what has been checked.
pub(super) fn buckets_of(
    positions: &Array,
    options: &RelativePositionBucketOptions,
) -> Result<Array> {
    if positions.size() == 0 {
        return Ok(zeros_dtype(positions.shape(), Dtype::Int32)?);
    }
    let table = options.buckets();
    let table = Array::from_slice(&table, &[table.len() as i32]);
    let farthest = options.max_distance;
    // Before the sign changes, for the least integer has no opposite.
    let near = clip(positions.as_dtype(Dtype::Int64)?, (-farthest, farthest))?;
    let near = near.as_dtype(Dtype::Int32)?;
    let zero = uploads::int(0);
    if !options.bidirectional {
        let distances = clip(near.negative()?, (0, farthest))?;
        return Ok(table.take_axis(distances, 0)?);
    }
    let ahead = near.gt(zero)?.as_dtype(Dtype::Int32)?;
    let ahead = ahead.multiply(uploads::int(options.of_a_direction()))?;
    Ok(table.take_axis(near.abs()?, 0)?.add(ahead)?)
}
