//! Attention of blocks of queries, each to the blocks of keys that it sees.

use mlx_rs::{
    Array,
    ops::{arange, broadcast_to, concatenate, indexing::TryIndexOp, ones, pad, zeros_dtype},
};

use super::layout::Blocks;
use crate::{
    attention::{FlashAttentionOptions, flash_attention, heads::Heads},
    error::Result,
    layout::Layout,
    uploads,
};

/// What one call attends to. Arrays are `[B, S, H, D]` and not empty.
pub(super) struct Gather<'a> {
    pub(super) queries: Array,
    pub(super) keys: Array,
    pub(super) values: Array,
    pub(super) heads: Heads,
    pub(super) blocks: Blocks,
    pub(super) rows: &'a [Vec<i32>],
    pub(super) scale: Option<f32>,
    pub(super) hides: Hides<'a>,
}

/// Which keys of a block that is seen are not.
#[derive(Clone, Copy)]
pub(super) enum Hides<'a> {
    Nothing,
    /// Those after the query.
    Later,
    /// Those farther away than `window`, and the tokens `elsewhere`, sorted: these every query sees, whatever its row.
    Far {
        window: i32,
        elsewhere: &'a [i32],
    },
}

impl Gather<'_> {
    /// `[B, S_q, H, D_v]`.
    pub(super) fn attend(&self) -> Result<Array> {
        let tiles = Tiles {
            queries: self.tiled(&self.queries, self.blocks.query_blocks())?,
            keys: self.tiled(&self.keys, self.blocks.key_blocks())?,
            values: self.tiled(&self.values, self.blocks.key_blocks())?,
        };
        let rows: Vec<_> = (0..self.rows.len()).map(|row| self.visible_row(row)).collect();
        let groups = groups(&rows);
        let attended: Vec<_> = groups
            .iter()
            .map(|group| self.attend_group(&tiles, &rows, group))
            .collect::<Result<_>>()?;
        let order: Vec<_> = groups.iter().flat_map(|group| group.rows.iter().copied()).collect();
        let attended = concatenate(&attended, 1)?.take_axis(inverse(&order), 1)?;
        Ok(attended.flatten(1, 2)?.try_index((.., ..self.heads.query_length))?)
    }

    /// `[B, S, H, D]` to `[B, blocks, block_size, H, D]`, zeros after the end.
    fn tiled(&self, array: &Array, blocks: i32) -> Result<Array> {
        let (size, length) = (self.blocks.block_size, array.dim(1));
        let missing = blocks * size - length;
        let whole = match missing {
            0 => array.clone(),
            _ => pad(array, &[(0, 0), (0, missing), (0, 0), (0, 0)], None, None)?,
        };
        Ok(whole.reshape(&[array.dim(0), blocks, size, array.dim(2), array.dim(3)])?)
    }

    /// How far the first query stands behind the first key.
    fn lead(&self) -> i32 {
        self.heads.key_length - self.heads.query_length
    }

    /// A row without the blocks that are wholly hidden.
    fn visible_row(&self, row: usize) -> Vec<i32> {
        let size = self.blocks.block_size;
        let last = (row as i32 * size + size).min(self.heads.query_length) - 1 + self.lead();
        let seen = |block: &i32| !matches!(self.hides, Hides::Later) || block * size <= last;
        self.rows[row].iter().copied().filter(seen).collect()
    }

    fn elsewhere(&self) -> &[i32] {
        match self.hides {
            Hides::Far { elsewhere, .. } => elsewhere,
            Hides::Nothing | Hides::Later => &[],
        }
    }

    /// `[B, rows, block_size, H, D_v]`.
    fn attend_group(&self, tiles: &Tiles, rows: &[Vec<i32>], group: &Group) -> Result<Array> {
        let Heads { batch, heads, value_size, dtype, .. } = self.heads;
        let (size, count) = (self.blocks.block_size, group.rows.len() as i32);
        if group.width == 0 && self.elsewhere().is_empty() {
            return Ok(zeros_dtype(&[batch, count, size, heads, value_size], dtype)?);
        }
        let slots = Slots::new(rows, group);
        let queries = tiles.queries.take_axis(integers(&group.rows), 1)?.flatten(0, 1)?;
        let mask = self.mask(group, &slots)?;
        let options = FlashAttentionOptions {
            scale: self.scale,
            mask: mask.as_ref(),
            layout: Layout::Bshd,
            ..Default::default()
        };
        let keys = self.gathered(&tiles.keys, &self.keys, &slots, count)?;
        let values = self.gathered(&tiles.values, &self.values, &slots, count)?;
        let attended = flash_attention(queries, keys, values, options)?;
        Ok(attended.reshape(&[batch, count, size, heads, value_size])?)
    }

    /// What each row sees: `[B · rows, keys, H_kv, D]`.
    fn gathered(&self, tiles: &Array, whole: &Array, slots: &Slots, rows: i32) -> Result<Array> {
        let (batch, heads, size) = (whole.dim(0), whole.dim(2), whole.dim(3));
        let near = slots.blocks.len() as i32 / rows * self.blocks.block_size;
        let near = tiles
            .take_axis(Array::from_slice(&slots.blocks, &[slots.blocks.len() as i32]), 1)?
            .reshape(&[batch, rows, near, heads, size])?;
        let elsewhere = self.elsewhere();
        if elsewhere.is_empty() {
            return Ok(near.flatten(0, 1)?);
        }
        let count = elsewhere.len() as i32;
        let others = whole.take_axis(Array::from_slice(elsewhere, &[count]), 1)?.expand_dims(1)?;
        let others = broadcast_to(others, &[batch, rows, count, heads, size])?;
        Ok(concatenate(&[near, others], 2)?.flatten(0, 1)?)
    }

    /// `[B · rows, 1, block_size or 1, keys]`, unless all keys are seen.
    fn mask(&self, group: &Group, slots: &Slots) -> Result<Option<Array>> {
        let Heads { batch, key_length, .. } = self.heads;
        let size = self.blocks.block_size;
        let whole = slots.whole && key_length % size == 0;
        if whole && matches!(self.hides, Hides::Nothing) {
            return Ok(None);
        }
        let (rows, width) = (group.rows.len() as i32, group.width as i32);
        let within = arange::<_, i32>(0, size, None)?;
        let starts = |blocks: &[i32], shape: &[i32]| -> Result<Array> {
            let firsts = Array::from_slice(blocks, shape).multiply(uploads::int(size))?;
            Ok(firsts.expand_dims(-1)?.add(&within)?)
        };
        let lead = uploads::int(self.lead());
        let queries = starts(&group.indices(), &[rows])?.add(lead)?.expand_dims(-1)?;
        let keys = starts(&slots.blocks, &[rows, width])?.reshape(&[rows, 1, width * size])?;
        let known = Array::from_slice(&slots.known, &[rows, 1, width, 1]);
        let known = broadcast_to(known, &[rows, 1, width, size])?.reshape(keys.shape())?;
        let known = known.logical_and(keys.lt(uploads::int(key_length))?)?;
        let visible = match self.shown(&queries, &keys)? {
            Some(shown) => known.logical_and(shown)?,
            None => known,
        };
        let visible = self.with_others(visible, rows)?.expand_dims_axes(&[0, 2])?;
        let shape = [&[batch], &visible.shape()[1..]].concat();
        Ok(Some(broadcast_to(visible, &shape)?.flatten(0, 1)?))
    }

    /// By the positions of queries, `[rows, block_size, 1]`, and of keys, `[rows, 1, keys]`.
    fn shown(&self, queries: &Array, keys: &Array) -> Result<Option<Array>> {
        match self.hides {
            Hides::Nothing => Ok(None),
            Hides::Later => Ok(Some(keys.le(queries)?)),
            Hides::Far { window, .. } => {
                let near = keys.subtract(queries)?.abs()?.le(uploads::int(window))?;
                Ok(Some(near.logical_and(self.is_elsewhere(keys)?.logical_not()?)?))
            }
        }
    }

    /// Whether the key at each position is one of those that every query sees.
    fn is_elsewhere(&self, positions: &Array) -> Result<Array> {
        let mut flags = vec![false; (self.blocks.key_blocks() * self.blocks.block_size) as usize];
        for &token in self.elsewhere() {
            if let Some(flag) = flags.get_mut(token as usize) {
                *flag = true;
            }
        }
        Ok(Array::from_slice(&flags, &[flags.len() as i32]).take_axis(positions, 0)?)
    }

    fn with_others(&self, visible: Array, rows: i32) -> Result<Array> {
        match self.elsewhere().len() as i32 {
            0 => Ok(visible),
            count => {
                let others = ones::<bool>(&[rows, visible.dim(1), count])?;
                Ok(concatenate(&[visible, others], -1)?)
            }
        }
    }
}

/// `[B, blocks, block_size, H, D]` each.
struct Tiles {
    queries: Array,
    keys: Array,
    values: Array,
}

/// Rows of about as many blocks, computed together.
#[derive(Debug, PartialEq)]
struct Group {
    width: usize,
    rows: Vec<usize>,
}

impl Group {
    fn indices(&self) -> Vec<i32> {
        self.rows.iter().map(|&row| row as i32).collect()
    }
}

/// Puts rows together of which none has less than three quarters of the blocks of the longest, so that padding costs a
/// third at most, and one row that sees everything costs nothing to the others.
fn groups(rows: &[Vec<i32>]) -> Vec<Group> {
    let mut order: Vec<_> = (0..rows.len()).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(rows[row].len()));
    let mut groups: Vec<Group> = Vec::new();
    for row in order {
        let length = rows[row].len();
        match groups.last_mut() {
            Some(group) if 4 * length >= 3 * group.width => group.rows.push(row),
            _ => groups.push(Group { width: length, rows: vec![row] }),
        }
    }
    groups
}

/// The blocks of a group's rows, each row filled up to the width.
struct Slots {
    blocks: Vec<i32>,
    known: Vec<bool>,
    whole: bool,
}

impl Slots {
    fn new(rows: &[Vec<i32>], group: &Group) -> Self {
        let mut slots = Self { blocks: Vec::new(), known: Vec::new(), whole: true };
        for &row in &group.rows {
            let missing = group.width - rows[row].len();
            slots.whole &= missing == 0;
            slots.blocks.extend(rows[row].iter().copied().chain(std::iter::repeat_n(0, missing)));
            slots.known.extend((0..group.width).map(|slot| slot < rows[row].len()));
        }
        slots
    }
}

fn integers(rows: &[usize]) -> Array {
    let rows: Vec<_> = rows.iter().map(|&row| row as i32).collect();
    Array::from_slice(&rows, &[rows.len() as i32])
}

/// Where each row went.
fn inverse(order: &[usize]) -> Array {
    let mut places = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &row)| places[row] = place);
    integers(&places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_like_length_go_together() {
        let rows = [3, 9, 4, 3, 0, 2, 4].map(|length| vec![0; length]);
        let group = |width, rows: &[usize]| Group { width, rows: rows.to_vec() };
        let expected = [group(9, &[1]), group(4, &[2, 6, 0, 3]), group(2, &[5]), group(0, &[4])];
        assert_eq!(groups(&rows), expected);
    }
}
