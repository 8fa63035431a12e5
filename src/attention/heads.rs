//! Queries, keys and values that belong together, whatever the layout.

use mlx_rs::{Array, Dtype, ops::zeros_like};

use crate::{
    check::{Axis, Check},
    error::Result,
    layout::Layout,
};

/// Their sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) batch: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) query_length: i32,
    pub(super) key_length: i32,
    pub(super) size: i32,
    pub(super) value_size: i32,
    pub(super) dtype: Dtype,
}

impl Heads {
    /// Checks the dtypes and the axes of queries, keys and values against each other.
    pub(super) fn new(
        check: Check,
        [queries, keys, values]: [&Array; 3],
        layout: Layout,
    ) -> Result<Self> {
        let dtype = check.floating("queries", queries)?;
        check.dtype_among("keys", keys, &[dtype])?;
        check.dtype_among("values", values, &[dtype])?;
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
        Ok(Self { batch, heads, kv_heads, query_length, key_length, size, value_size, dtype })
    }
}

/// Queries and a scale above zero that give the same scores: cuDNN answers NaN to any other.
pub(crate) fn with_positive_scale(queries: &Array, scale: f32) -> Result<(Array, f32)> {
    Ok(match scale {
        0.0 => (zeros_like(queries)?, 1.0),
        scale if scale < 0.0 => (queries.negative()?, -scale),
        scale => (queries.clone(), scale),
    })
}
