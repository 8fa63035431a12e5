//! The sizes of one call, whatever the layout.

use std::ops::Range;

use mlx_rs::{Array, Dtype};

use super::options::Window;
use crate::{attention::heads::Heads, check::Check, error::Result, layout::Layout};

#[derive(Clone, Copy)]
pub(in crate::attention) struct Dims {
    pub(in crate::attention) batch: i32,
    pub(in crate::attention) heads: i32,
    pub(in crate::attention) query_length: i32,
    pub(in crate::attention) key_length: i32,
    pub(in crate::attention) size: i32,
    pub(in crate::attention) value_size: i32,
    pub(in crate::attention) dtype: Dtype,
    /// The index of the first query, and of the first key, in a call of which this is a part.
    pub(super) first_query: i32,
    pub(super) first_key: i32,
    /// How far after a query the key beside it stands: `S_kv − S_q` of the whole call.
    pub(super) offset: i32,
}

impl Dims {
    /// Checks queries, keys and values as [`Heads::new`] does.
    pub(in crate::attention) fn new(
        check: Check,
        arrays: [&Array; 3],
        layout: Layout,
    ) -> Result<Self> {
        let Heads { batch, heads, query_length, key_length, size, value_size, dtype, .. } =
            Heads::new(check, arrays, layout)?;
        let offset = key_length - query_length;
        let [first_query, first_key] = [0; 2];
        Ok(Self {
            batch,
            heads,
            query_length,
            key_length,
            size,
            value_size,
            dtype,
            first_query,
            first_key,
            offset,
        })
    }

    /// `[B, H, S_q, S_kv]`.
    pub(in crate::attention) fn scores(&self) -> [i32; 4] {
        [self.batch, self.heads, self.query_length, self.key_length]
    }

    /// `[B, H, S_q, D_v]`.
    pub(in crate::attention) fn result(&self) -> [i32; 4] {
        [self.batch, self.heads, self.query_length, self.value_size]
    }

    /// The window that hides the same keys, with causality in it and without a side that hides none.
    pub(super) fn window(&self, causal: bool, window: Window) -> Window {
        let right = if causal { Some(0) } else { window.right };
        Window {
            left: window.left.filter(|&left| left < self.key_length - 1),
            right: right.filter(|&right| right < self.query_length - 1),
        }
    }

    /// How many of the first queries come before every key that such a window shows.
    pub(super) fn queries_before_keys(&self, window: Window) -> i32 {
        let before = |right| self.first_key - self.first_query - self.offset - right;
        window.right.map_or(0, |right: i32| before(right).clamp(0, self.query_length))
    }

    /// The keys that such a window shows to any of these queries, both counted from the first here.
    pub(super) fn keys_of(&self, queries: Range<i32>, window: Window) -> Range<i32> {
        let beside = |query: i32| self.first_query + query + self.offset - self.first_key;
        let start = window.left.map_or(0, |left| (beside(queries.start) - left).max(0));
        let end = window.right.map_or(self.key_length, |right| beside(queries.end) + right);
        start..end.clamp(start, self.key_length.max(start))
    }

    /// These queries and keys alone.
    pub(super) fn part(self, queries: &Range<i32>, keys: &Range<i32>) -> Self {
        Self {
            query_length: queries.end - queries.start,
            key_length: keys.end - keys.start,
            first_query: self.first_query + queries.start,
            first_key: self.first_key + keys.start,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(query_length: i32, key_length: i32) -> Dims {
        let offset = key_length - query_length;
        let ([batch, heads, size, value_size], dtype) = ([1; 4], Dtype::Float32);
        let [first_query, first_key] = [0; 2];
        Dims {
            batch,
            heads,
            query_length,
            key_length,
            size,
            value_size,
            dtype,
            first_query,
            first_key,
            offset,
        }
    }

    #[test]
    fn a_side_that_hides_nothing_is_no_side() {
        let window = |left, right| Window { left, right };
        let all = Window::default();
        assert_eq!(dims(3, 5).window(true, all), window(None, Some(0)));
        assert_eq!(dims(3, 5).window(true, window(None, Some(1))), window(None, Some(0)));
        assert_eq!(dims(3, 5).window(false, window(Some(3), Some(1))), window(Some(3), Some(1)));
        assert_eq!(dims(3, 5).window(false, window(Some(4), Some(2))), all);
        assert_eq!(dims(1, 5).window(true, all), all, "the last query sees every key");
        assert_eq!(dims(0, 0).window(true, window(Some(0), None)), all);
        assert_eq!(dims(3, 5).window(false, window(Some(i32::MAX), Some(i32::MAX))), all);
    }

    #[test]
    fn queries_before_keys_are_counted() {
        let before = |queries, keys, right| {
            dims(queries, keys).queries_before_keys(Window { left: None, right })
        };
        assert_eq!(before(5, 3, Some(0)), 2);
        assert_eq!(before(5, 3, Some(1)), 1);
        assert_eq!(before(5, 3, Some(2)), 0);
        assert_eq!(before(5, 3, None), 0);
        assert_eq!(before(3, 5, Some(0)), 0);
    }

    #[test]
    fn a_block_of_queries_sees_the_keys_of_its_window() {
        let keys = |queries, left, right| dims(6, 8).keys_of(queries, Window { left, right });
        assert_eq!(keys(0..2, None, None), 0..8);
        assert_eq!(keys(0..2, None, Some(0)), 0..4);
        assert_eq!(keys(4..6, Some(1), Some(0)), 5..8);
        assert_eq!(keys(2..3, Some(1), Some(3)), 3..8);
        assert_eq!(dims(8, 3).keys_of(0..2, Window { left: None, right: Some(0) }), 0..0);
        let part = dims(6, 8).part(&(2..6), &(3..8));
        assert_eq!(part.keys_of(0..1, Window { left: Some(1), right: Some(0) }), 0..2);
        assert_eq!(part.queries_before_keys(Window { left: None, right: Some(0) }), 0);
        let late = dims(6, 8).part(&(0..6), &(4..8));
        assert_eq!(late.queries_before_keys(Window { left: None, right: Some(0) }), 2);
    }
}
