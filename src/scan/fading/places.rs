//! Segments among chunks.

use mlx_rs::{
    Array, Dtype,
    ops::{
        arange, broadcast_to, concatenate, exp, floor_divide, indexing::TryIndexOp, remainder,
        select, zeros,
    },
};

use super::{
    decay::{Fade, outer},
    layout::Layout,
};
use crate::{error::Result, scan::associative, uploads};

/// Which steps of chunks belong together.
pub(in crate::scan) struct Places {
    /// `[n, Q, Q]`: whether two steps are of one segment.
    pub(super) same: Array,
    /// `[n, Q, 1]`: whether a step is of the segment that the chunk before ended with.
    pub(super) entered: Array,
    /// `[n, Q, 1]`: whether a step is of the segment that the chunk ends with.
    pub(super) leaving: Array,
    /// `[n, 1, 1]`: whether one segment goes through the chunk.
    pub(super) alive: Array,
    /// `[n, Q]`
    owners: Array,
    /// `[n]`: the segment that the chunk before ended with.
    before: Array,
    /// `[N]`: the last step of each, or any where it is empty.
    ends: Array,
    /// `[N]`
    empty: Array,
}

impl Places {
    /// `segments` are checked.
    pub(in crate::scan) fn new(segments: &[i32], layout: &Layout) -> Result<Self> {
        let bounds = uploads::integers(segments.to_vec());
        let along = associative::segments::Places::new(&bounds, layout.length, false)?;
        let (count, chunk) = (layout.chunks(), layout.chunk);
        let last = along.owners().try_index(-1..)?;
        let filled = broadcast_to(&last, &[layout.padding()])?;
        let owners = concatenate(&[along.owners(), &filled], 0)?.reshape(&[count, chunk])?;
        let lasts = owners.try_index((.., -1..))?;
        let none = uploads::integers(vec![-1]).reshape(&[1, 1])?;
        let before = concatenate(&[none, lasts.try_index(..count - 1)?], 0)?;
        let spread = |array: Array, rows: i32, columns: i32| array.reshape(&[count, rows, columns]);
        let same = owners.expand_dims(2)?.eq(owners.expand_dims(1)?)?;
        Ok(Self {
            same: spread(same, chunk, chunk)?,
            entered: spread(owners.eq(&before)?, chunk, 1)?,
            leaving: spread(owners.eq(&lasts)?, chunk, 1)?,
            alive: spread(lasts.eq(&before)?, 1, 1)?,
            before: before.flatten(None, None)?,
            owners,
            ends: along.ends().clone(),
            empty: along.empty().clone(),
        })
    }

    /// The states after each segment, `[B, N, G, R, K, V]`, given keys, values and the states before chunks.
    pub(in crate::scan) fn states(
        &self,
        fade: &Fade,
        [keys, values, carried]: [&Array; 3],
    ) -> Result<Array> {
        let (count, chunk) = (self.ends.dim(0), self.owners.dim(1));
        let (size, number) = (uploads::int(chunk), arange::<_, i32>(0, count, 1)?);
        let chunks = floor_divide(&self.ends, &size)?.as_dtype(Dtype::Int32)?;
        let step = remainder(&self.ends, &size)?.reshape(&[count, 1])?;
        let of = |array: &Array| array.take_axis(&chunks, 3);
        let spread = |array: Array| array.reshape(&[count, -1, 1]);
        let place = arange::<_, i32>(0, chunk, 1)?.reshape(&[1, chunk])?;
        let nothing = uploads::float(0.0);
        let sums = of(fade.sums())?;
        let at_end = select(spread(place.eq(step)?)?, &sums, &nothing)?.sum_axis(-2, true)?;
        let own = self.owners.take_axis(&chunks, 0)?.eq(number.reshape(&[count, 1])?)?;
        let hidden = uploads::float(f32::NEG_INFINITY);
        let left = exp(select(spread(own)?, at_end.subtract(&sums)?, hidden)?)?;
        let added = outer(&of(keys)?, &of(values)?, &left)?.as_dtype(Dtype::Float32)?;
        let entered = self.before.take_axis(&chunks, 0)?.eq(number)?;
        let through = exp(at_end.swap_axes(-1, -2)?)?;
        let through = select(spread(entered)?, through, &nothing)?;
        let states = of(carried)?.multiply(through)?.add(added)?;
        let none = zeros::<f32>(&[1])?;
        Ok(select(self.empty.reshape(&[count, 1, 1])?, none, states)?.move_axis(3, 1)?)
    }
}
