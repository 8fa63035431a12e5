//! How a step attends where no kernel reads blocks: which sequences attend in one call, and from where their keys come.

use std::{cmp::Reverse, ops::Range};

use mlx_rs::{
    Array,
    ops::{concatenate, indexing::TryIndexOp, zeros_dtype},
};

use super::{held::Held, step::Span};
use crate::{
    attention::{FlashAttentionOptions, Window, flash_attention},
    error::Result,
    layout::Layout,
    uploads,
};

/// The calls of one step.
#[derive(Debug, Clone)]
pub(super) struct Dense {
    calls: Vec<Call>,
    /// Rows of no sequence, which come last.
    padding: i32,
    /// Where each row of the step is, in what the calls yield one after another; `None` if in order.
    places: Option<Array>,
}

/// Sequences of one row each that attend together, or one of any number of rows.
///
/// The last keys of all stand side by side, so that windows and distances count from the right one. What stands before
/// the first key of a shorter sequence is the first slot of the pool, which is zero: what lies in others may be NaN, and a
/// weight of zero does not hide that.
#[derive(Debug, Clone)]
struct Call {
    rows: Rows,
    /// `[N, 1, S_kv]`, i32.
    slots: Array,
    /// `[N, 1, 1, S_kv]`; `None` if all sequences are equally long.
    mask: Option<Array>,
}

/// Rows of the step.
#[derive(Debug, Clone)]
enum Rows {
    Run(Range<i32>),
    Some(Array),
}

impl Dense {
    pub(super) fn new(spans: &[Span], block_size: i32, rows: i32) -> Self {
        let (single, several): (Vec<&Span>, Vec<&Span>) =
            spans.iter().partition(|span| span.rows.len() == 1);
        let mut groups = by_length(single);
        groups.extend(several.into_iter().map(|span| vec![span]));
        let called = groups.iter().flatten().flat_map(|span| span.rows.clone());
        let tokens = spans.last().map_or(0, |span| span.rows.end);
        let places = places(&called.chain(tokens..rows).collect::<Vec<_>>());
        let calls = groups.iter().map(|group| Call::new(group, block_size)).collect();
        Self { calls, padding: rows - tokens, places }
    }

    /// What `[T, H, D]` see, row by row, `[T, H, D_v]`: single tokens together, longer stretches one after another.
    pub(super) fn attend(
        &self,
        queries: &Array,
        held: &[Held; 2],
        options: &FlashAttentionOptions,
    ) -> Result<Array> {
        let options = FlashAttentionOptions { layout: Layout::Bhsd, ..options.clone() };
        let mut parts = Vec::new();
        for call in &self.calls {
            let queries = match &call.rows {
                Rows::Run(rows) => queries.try_index(rows.clone())?,
                Rows::Some(rows) => queries.take_axis(rows, 0)?,
            };
            parts.push(call.attend(&queries, held, &options)?);
        }
        if self.padding > 0 {
            let shape = [self.padding, queries.dim(1), held[1].shape()[3]];
            parts.push(zeros_dtype(&shape, queries.dtype())?);
        }
        let rows = concatenate(&parts, 0)?;
        Ok(self.places.as_ref().map_or(Ok(rows.clone()), |places| rows.take_axis(places, 0))?)
    }
}

/// Groups in each of which none is more than twice as long as another, so that little is gathered in vain.
fn by_length(mut spans: Vec<&Span>) -> Vec<Vec<&Span>> {
    spans.sort_by_key(|span| Reverse(span.context));
    let mut groups: Vec<Vec<&Span>> = Vec::new();
    for span in spans {
        match groups.last_mut() {
            Some(group) if group[0].context / 2 <= span.context => group.push(span),
            _ => groups.push(vec![span]),
        }
    }
    // In the order of the step, so that rows need no gathering where one group is all there is.
    groups.iter_mut().for_each(|group| group.sort_by_key(|span| span.rows.start));
    groups
}

/// Where each row stands in `order`, unless each stands in its own place.
fn places(order: &[i32]) -> Option<Array> {
    let in_order = order.iter().zip(0..).all(|(&row, place)| row == place);
    let mut places = vec![0; order.len()];
    order.iter().zip(0..).for_each(|(&row, place)| places[row as usize] = place);
    (!in_order).then(|| Array::from_slice(&places, &[places.len() as i32]))
}

impl Call {
    fn new(spans: &[&Span], block_size: i32) -> Self {
        let count = spans.len() as i32;
        let length = spans.iter().map(|span| span.context).max().unwrap_or_default();
        let mut slots = Vec::new();
        let mut visible = Vec::new();
        for span in spans {
            let before = length - span.context;
            slots.extend(std::iter::repeat_n(0, before as usize));
            slots.extend((0..span.context).map(|position| {
                span.table[(position / block_size) as usize] * block_size + position % block_size
            }));
            visible.extend((0..length).map(|place| place >= before));
        }
        let mask = visible.contains(&false);
        let mask = mask.then(|| Array::from_slice(&visible, &[count, 1, 1, length]));
        let slots = Array::from_slice(&slots, &[count, 1, length]);
        Self { rows: rows(spans), slots, mask }
    }

    /// What `[_, H, D]` of its rows see, `[_, H, D_v]`. The layout of the options is [`Layout::Bhsd`].
    fn attend(
        &self,
        queries: &Array,
        [keys, values]: &[Held; 2],
        options: &FlashAttentionOptions,
    ) -> Result<Array> {
        let (keys, values) = (self.gathered(keys)?, self.gathered(values)?);
        let options = FlashAttentionOptions { mask: self.mask.as_ref(), ..options.clone() };
        let [sequences, _, key_heads, _] = Layout::Bhsd.dims(&keys);
        let [rows, heads, size] = [0, 1, 2].map(|axis| queries.dim(axis));
        if rows > sequences {
            // Of one sequence, whose queries follow each other.
            let queries = queries.swap_axes(0, 1)?.expand_dims(0)?;
            let attended = flash_attention(queries, keys, values, options)?;
            return Ok(attended.squeeze_axes(&[0])?.swap_axes(0, 1)?);
        }
        let by_head = options.alibi_slopes.is_some() || options.sinks.is_some();
        let (queries, options) = if by_head || options.window.left.is_some() {
            (queries.expand_dims(2)?, options)
        } else {
            // The heads that share keys attend as if they were queries of one head: a CPU multiplies by each key once for all.
            let shape = [sequences, key_heads, heads / key_heads, size];
            let window = Window::default();
            (queries.reshape(&shape)?, FlashAttentionOptions { causal: false, window, ..options })
        };
        let value_size = values.dim(3);
        let attended = flash_attention(queries, keys, values, options)?;
        Ok(attended.reshape(&[rows, heads, value_size])?)
    }

    /// `[N, H_kv, S_kv, _]`, one head after another, which a CPU multiplies several times as fast as one token after another.
    fn gathered(&self, held: &Held) -> Result<Array> {
        let [.., heads, _] = held.shape();
        let head = uploads::integers((0..heads).collect()).expand_dims(-1)?;
        let rows = self.slots.multiply(uploads::int(heads))?.add(head)?;
        held.picked(|array| Ok(array.flatten(0, 2)?.take_axis(&rows, 0)?))
    }
}

fn rows(spans: &[&Span]) -> Rows {
    let rows: Vec<_> = spans.iter().flat_map(|span| span.rows.clone()).collect();
    let first = rows.first().copied().unwrap_or_default();
    match rows.iter().zip(first..).all(|(&row, place)| row == place) {
        true => Rows::Run(first..first + rows.len() as i32),
        false => Rows::Some(Array::from_slice(&rows, &[rows.len() as i32])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(rows_and_contexts: &[(i32, i32)]) -> Vec<Span> {
        let mut first = 0;
        let span = |&(rows, context): &(i32, i32)| {
            first += rows;
            Span { rows: first - rows..first, table: (1..=context / 2 + 1).collect(), context }
        };
        rows_and_contexts.iter().map(span).collect()
    }

    #[test]
    fn single_tokens_of_like_lengths_attend_together() {
        let dense = Dense::new(&spans(&[(1, 3), (1, 4), (1, 6)]), 2, 3);
        assert_eq!((dense.calls.len(), dense.places.is_none()), (1, true));
        let call = &dense.calls[0];
        assert!(matches!(call.rows, Rows::Run(Range { start: 0, end: 3 })));
        assert_eq!(call.slots.as_slice::<i32>()[..6], [0, 0, 0, 2, 3, 4]);
        let mask = call.mask.as_ref().map(|mask| mask.as_slice::<bool>()[..6].to_vec());
        assert_eq!(mask, Some(vec![false, false, false, true, true, true]));
        let equal = Dense::new(&spans(&[(1, 3), (1, 3)]), 2, 2);
        assert!(equal.calls[0].mask.is_none());
    }

    #[test]
    fn rows_come_back_to_their_places() {
        let dense = Dense::new(&spans(&[(2, 4), (1, 9), (1, 20), (1, 2), (1, 11)]), 2, 7);
        assert_eq!(dense.calls.len(), 4, "20 with 11, and 9 is too short for them");
        let places = dense.places.as_ref().map(|places| places.as_slice::<i32>().to_vec());
        assert_eq!(places, Some(vec![4, 5, 2, 0, 3, 1, 6]));
    }
}
