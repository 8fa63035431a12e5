//! Attention of one step over blocks.

use std::ops::Range;

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, zeros_dtype},
};

use super::{
    dense::{Call, Dense, Rows},
    held::Held,
    kv::CHECK,
    step::PagedStep,
};
use crate::{
    attention::{
        FlashAttentionOptions, PagedAttentionOptions, Window, flash_attention, paged_attention,
    },
    check::axes,
    dispatch::{Backend, Context, Dispatch, Target},
    error::{Error, Result},
    layout::Layout,
    uploads,
};

/// Refuses what no row can heed.
pub(super) fn check(queries: &Array, options: &FlashAttentionOptions) -> Result<()> {
    let none = "be none over blocks of a pool";
    CHECK.value(options.mask.is_none(), "mask", none, "one")?;
    CHECK.value(options.segments.is_none(), "segments", none, "some")?;
    CHECK.value(options.dropout.is_none(), "dropout", none, "one")?;
    let heads = options.layout.dims(queries)[2];
    options.alibi_slopes.map_or(Ok(()), |slopes| CHECK.shape("alibi_slopes", slopes, axes![heads]))
}

/// `[T, H, D_v]` of `queries`, `[T, H, D]`, over the blocks of a step whose tokens are written.
pub(super) fn attend(
    queries: &Array,
    blocks: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let context = Context::current()?;
    let auto = options.dispatch == Dispatch::Auto;
    // A host that acts out kernels on a CPU does so for tests.
    let gathers = context.target == Target::Cpu || context.obstacle.is_some();
    if auto && gathers {
        return by_sequence(queries, blocks, step, options);
    }
    let by_mlx = auto || options.dispatch == Dispatch::Only(Backend::Builtin);
    let held = blocks.iter().all(|blocks| is_fused_by_mlx(blocks) || !auto && is_plain(blocks));
    if let Some(slots) = step.run().filter(|_| by_mlx && held && asks_little(options)) {
        return over_run(queries, blocks, slots, options);
    }
    if !auto {
        return by_paged_attention(queries, blocks, step, options, options.dispatch);
    }
    let kernel = Dispatch::Only(Backend::Kernel);
    match by_paged_attention(queries, blocks, step, options, kernel) {
        Err(Error::Unavailable { .. }) => by_sequence(queries, blocks, step, options),
        attended => attended,
    }
}

fn is_plain(blocks: &Held) -> bool {
    blocks.scales().is_none()
}

/// Whether MLX attends to such keys, or values, without all scores in memory, on every GPU.
fn is_fused_by_mlx(blocks: &Held) -> bool {
    let [.., size] = blocks.shape();
    is_plain(blocks) && blocks.dtype() != Dtype::Float32 && size <= 128
}

/// Whether MLX's own op knows all that is asked for.
fn asks_little(options: &FlashAttentionOptions) -> bool {
    let FlashAttentionOptions { soft_cap, alibi_slopes, window, sinks, .. } = options;
    let windowed = window.left.is_some() || window.right.is_some();
    soft_cap.is_none() && alibi_slopes.is_none() && sinks.is_none() && !windowed
}

/// The same over keys that lie one after another, which need neither tables nor a copy: as for a sequence that is alone.
fn over_run(
    queries: &Array,
    [keys, values]: &[Held; 2],
    slots: Range<i32>,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let tokens = |blocks: &Held| -> Result<Array> {
        Ok(blocks.numbers().flatten(0, 1)?.try_index(slots.clone())?.expand_dims(0)?)
    };
    let options = FlashAttentionOptions { layout: Layout::Bshd, ..options.clone() };
    let attended =
        flash_attention(queries.expand_dims(0)?, tokens(keys)?, tokens(values)?, options)?;
    Ok(attended.squeeze_axes(&[0])?)
}

fn by_paged_attention(
    queries: &Array,
    [keys, values]: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
    dispatch: Dispatch,
) -> Result<Array> {
    let options = PagedAttentionOptions {
        query_starts: Some(&step.query_starts),
        scale: options.scale,
        soft_cap: options.soft_cap,
        alibi_slopes: options.alibi_slopes,
        causal: options.causal,
        window: options.window,
        sinks: options.sinks,
        key_scales: keys.scales(),
        value_scales: values.scales(),
        dispatch,
    };
    let (tables, lengths) = (&step.block_tables, &step.context_lengths);
    paged_attention(queries, keys.numbers(), values.numbers(), tables, lengths, options)
}

/// The same by attention over keys side by side: single tokens together, longer stretches one after another.
fn by_sequence(
    queries: &Array,
    blocks: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let options = FlashAttentionOptions { layout: Layout::Bhsd, ..options.clone() };
    let dense = step.dense.get_or_init(|| Dense::new(&step.spans, step.block_size, step.rows()));
    let mut parts = Vec::new();
    for call in &dense.calls {
        let queries = match &call.rows {
            Rows::Run(rows) => queries.try_index(rows.clone())?,
            Rows::Some(rows) => queries.take_axis(rows, 0)?,
        };
        parts.push(attend_in(call, &queries, blocks, &options)?);
    }
    let padding = step.rows() - step.tokens();
    if padding > 0 {
        let shape = [padding, queries.dim(1), blocks[1].shape()[3]];
        parts.push(zeros_dtype(&shape, queries.dtype())?);
    }
    let rows = concatenate(&parts, 0)?;
    Ok(dense.places.as_ref().map_or(Ok(rows.clone()), |places| rows.take_axis(places, 0))?)
}

/// `[_, H, D_v]` of the queries of one call, `[_, H, D]`.
fn attend_in(
    call: &Call,
    queries: &Array,
    blocks: &[Held; 2],
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let [keys, values] = blocks;
    let (keys, values) = (side_by_side(keys, call)?, side_by_side(values, call)?);
    let options = FlashAttentionOptions { mask: call.mask.as_ref(), ..options.clone() };
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
fn side_by_side(held: &Held, call: &Call) -> Result<Array> {
    let [.., heads, _] = held.shape();
    let head = uploads::integers((0..heads).collect()).expand_dims(-1)?;
    let rows = call.slots.multiply(uploads::int(heads))?.add(head)?;
    held.picked(|array| Ok(array.flatten(0, 2)?.take_axis(&rows, 0)?))
}
