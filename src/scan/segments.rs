//! Sequences of several lengths, laid one after another along an axis.

use crate::{check::Check, error::Result};

/// How many sequences there are: each row of the batch, or each of `segments`, which must cut the one row of `length`
/// steps into as many.
pub(super) fn count(
    check: Check,
    segments: Option<&[i32]>,
    batch: i32,
    length: i32,
) -> Result<i32> {
    let alone = segments.is_none() || batch == 1;
    check.value(alone, "segments", "come with a batch of one", batch)?;
    Ok(along(check, segments, length)?.unwrap_or(batch))
}

/// How many sequences `segments` cut an axis of `length` steps into, if there are any: they start at 0, do not fall, and
/// end at `length`.
pub(super) fn along(check: Check, segments: Option<&[i32]>, length: i32) -> Result<Option<i32>> {
    let Some(segments) = segments else { return Ok(None) };
    let first = check.known(segments.first(), "segments", "have a first number", "none")?;
    check.value(*first == 0, "segments", "start at 0", first)?;
    let falls = segments.windows(2).find(|pair| pair[0] > pair[1]);
    check.value(falls.is_none(), "segments", "not fall", format_args!("{falls:?}"))?;
    let last = segments.last().unwrap_or(first);
    check.value(*last == length, "segments", format_args!("end at L = {length}"), last)?;
    let count = i32::try_from(segments.len() - 1).ok();
    check.known(count, "segments", "be fewer than 2^31", segments.len()).map(Some)
}
