//! The sizes of one call, whatever the layout.

use mlx_rs::Array;

use crate::{
    check::{Axis, Check},
    error::Result,
    layout::Layout,
};

pub(super) struct Dims {
    pub(super) batch: i32,
    pub(super) heads: i32,
    pub(super) query_length: i32,
    pub(super) key_length: i32,
    pub(super) size: i32,
    pub(super) value_size: i32,
}

impl Dims {
    /// Checks the axes of queries, keys and values against each other.
    pub(super) fn new(
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
    pub(super) fn scores(&self) -> [i32; 4] {
        [self.batch, self.heads, self.query_length, self.key_length]
    }

    /// `[B, H, S_q, D_v]`.
    pub(super) fn result(&self) -> [i32; 4] {
        [self.batch, self.heads, self.query_length, self.value_size]
    }
}
