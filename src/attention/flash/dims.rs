//! The sizes of one call, whatever the layout.

use mlx_rs::Array;

use super::options::Window;
use crate::{
    check::{Axis, Check},
    error::Result,
    layout::Layout,
};

pub(in crate::attention) struct Dims {
    pub(in crate::attention) batch: i32,
    pub(in crate::attention) heads: i32,
    pub(in crate::attention) query_length: i32,
    pub(in crate::attention) key_length: i32,
    pub(in crate::attention) size: i32,
    pub(in crate::attention) value_size: i32,
}

impl Dims {
    /// Checks the axes of queries, keys and values against each other.
    pub(in crate::attention) fn new(
        check: Check,
        queries: &Array,
        keys: &Array,
        values: &Array,
        layout: Layout,
    ) -> Result<Self> {
        let dims = |name, array: &Array, axes: [Axis; 4]| {
            check.shape(name, array, &axes).map(|()| layout.dims(array))
        };
        let [batch, query_length, heads, size] =
            dims("queries", queries, layout.axes("B", "S_q", "H", "D"))?;
        check.last_axis("queries", queries)?;
        let [_, key_length, kv_heads, _] =
            dims("keys", keys, layout.axes(batch, "S_kv", "H_kv", size))?;
        let [.., value_size] =
            dims("values", values, layout.axes(batch, key_length, kv_heads, "D_v"))?;

        let divides = heads.checked_rem(kv_heads).unwrap_or(heads) == 0;
        let expected = format_args!("have a multiple of H_kv = {kv_heads} heads");
        check.value(divides, "queries", expected, heads)?;
        Ok(Self { batch, heads, query_length, key_length, size, value_size })
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
        let shown = |right: i32| (self.query_length - self.key_length - right).max(0);
        window.right.map_or(0, shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(query_length: i32, key_length: i32) -> Dims {
        Dims { batch: 1, heads: 1, query_length, key_length, size: 1, value_size: 1 }
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
}
