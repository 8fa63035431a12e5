//! A checked call, and what is read off it before anything is computed.

use mlx_rs::{
    Array, Dtype,
    ops::{arange, broadcast_to, zeros_dtype},
};

use super::{BlockForm, PagedAttentionOptions, kernel};
use crate::{
    attention::flash::Window,
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatched},
    error::Result,
    kernel::stand_in,
    uploads,
};

/// The arrays, in the order in which the kernel takes them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands<A> {
    /// `[T, H, D]`.
    pub(super) queries: A,
    /// `[BLOCKS, BLOCK, H_kv, D]`.
    pub(super) keys: A,
    /// `[BLOCKS, BLOCK, H_kv, D_v]`.
    pub(super) values: A,
    /// `[N + 1]`, i32.
    pub(super) starts: A,
    /// `[N, W]`, i32.
    pub(super) tables: A,
    /// `[N]`, i32.
    pub(super) lengths: A,
    /// `[BLOCKS, BLOCK or 1, H_kv]`, f32; those of plain blocks are unread.
    pub(super) key_scales: A,
    pub(super) value_scales: A,
    /// `[H]`, unread without ALiBi.
    pub(super) slopes: A,
    /// `[H]`, unread without sinks.
    pub(super) sinks: A,
}

impl Operands<Array> {
    pub(super) fn as_ref(&self) -> Operands<&Array> {
        Operands {
            queries: &self.queries,
            keys: &self.keys,
            values: &self.values,
            starts: &self.starts,
            tables: &self.tables,
            lengths: &self.lengths,
            key_scales: &self.key_scales,
            value_scales: &self.value_scales,
            slopes: &self.slopes,
            sinks: &self.sinks,
        }
    }

    /// As transforms see them; [`Operands::of`] undoes it.
    pub(super) fn in_order(&self) -> [&Array; 10] {
        [
            &self.queries,
            &self.keys,
            &self.values,
            &self.starts,
            &self.tables,
            &self.lengths,
            &self.key_scales,
            &self.value_scales,
            &self.slopes,
            &self.sinks,
        ]
    }
}

impl<'a> Operands<&'a Array> {
    pub(super) fn of(arrays: &'a [Array; 10]) -> Self {
        let [
            queries,
            keys,
            values,
            starts,
            tables,
            lengths,
            key_scales,
            value_scales,
            slopes,
            sinks,
        ] = arrays;
        Self {
            queries,
            keys,
            values,
            starts,
            tables,
            lengths,
            key_scales,
            value_scales,
            slopes,
            sinks,
        }
    }
}

/// What a problem is besides its arrays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rule {
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
    /// With causality as a `right` of 0.
    pub(super) window: Window,
    /// Of keys and of values.
    pub(super) forms: [BlockForm; 2],
    pub(super) alibi: bool,
    pub(super) sinks: bool,
}

/// Everything a backend reads. No array is evaluated, and none copied.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) operands: Operands<Array>,
    pub(super) rule: Rule,
}

impl Problem {
    pub(super) fn new(
        queries: &Array,
        [key_blocks, value_blocks]: [&Array; 2],
        block_tables: &Array,
        context_lengths: &Array,
        options: &PagedAttentionOptions,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("queries", queries)?;
        check.shape("queries", queries, axes!["T", "H", "D"])?;
        let size = check.last_axis("queries", queries)?;
        let stored = [dtype, Dtype::Int8, Dtype::Uint8];
        check.dtype_among("key_blocks", key_blocks, &stored)?;
        check.shape("key_blocks", key_blocks, axes!["BLOCKS", "BLOCK", "H_kv", size])?;
        let [blocks, block, key_heads] = [0, 1, 2].map(|axis| key_blocks.dim(axis));
        check.at_least("the size of a block", block, 1)?;
        check.dtype_among("value_blocks", value_blocks, &stored)?;
        check.shape("value_blocks", value_blocks, axes![blocks, block, key_heads, "D_v"])?;
        let heads = queries.dim(1);
        let divides = heads.checked_rem(key_heads).unwrap_or(heads) == 0;
        let expected = format_args!("have a multiple of H_kv = {key_heads} heads");
        check.value(divides, "queries", expected, heads)?;

        check.dtype_among("block_tables", block_tables, &[Dtype::Int32])?;
        check.shape("block_tables", block_tables, axes!["N", "W"])?;
        let sequences = block_tables.dim(0);
        check.dtype_among("context_lengths", context_lengths, &[Dtype::Int32])?;
        check.shape("context_lengths", context_lengths, axes![sequences])?;
        let starts = starts(check, queries, sequences, options.query_starts)?;
        let forms = [key_blocks, value_blocks].map(|blocks| BlockForm::of(blocks.dtype()));
        let key_scales = scales(check, "key_scales", options.key_scales, key_blocks)?;
        let value_scales = scales(check, "value_scales", options.value_scales, value_blocks)?;

        let scale = options.scale.unwrap_or_else(|| (size as f32).sqrt().recip());
        check.finite("scale", scale)?;
        check_rule(check, options, heads)?;
        let right = if options.causal { Some(0) } else { options.window.right };
        let rule = Rule {
            scale,
            soft_cap: options.soft_cap,
            window: Window { left: options.window.left, right },
            forms,
            alibi: options.alibi_slopes.is_some(),
            sinks: options.sinks.is_some(),
        };
        let operands = Operands {
            queries: queries.clone(),
            keys: key_blocks.clone(),
            values: value_blocks.clone(),
            starts,
            tables: block_tables.clone(),
            lengths: context_lengths.clone(),
            key_scales,
            value_scales,
            slopes: options.alibi_slopes.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1)),
            sinks: options.sinks.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1)),
        };
        Ok(Self { operands, rule })
    }

    /// The same with starts that do not fall: else a query would be of two sequences at once, and two groups of threads would
    /// race for its result.
    pub(super) fn with_rising_starts(self) -> Result<Self> {
        let starts = self.operands.starts.cummax(0, false, true)?;
        Ok(Self { operands: Operands { starts, ..self.operands }, ..self })
    }

    /// Whether no query sees a key, or there is nothing to fill.
    pub(super) fn is_empty(&self) -> bool {
        let Operands { queries, keys, values, tables, .. } = &self.operands;
        [queries, keys, values, tables].into_iter().any(|array| array.size() == 0)
    }

    /// The result where none does.
    pub(super) fn nothing(&self) -> Result<[Array; 2]> {
        let Operands { queries, values, sinks, .. } = &self.operands;
        let (count, heads) = (queries.dim(0), queries.dim(1));
        let output = zeros_dtype(&[count, heads, values.dim(3)], queries.dtype())?;
        let lse = if self.rule.sinks {
            sinks.as_dtype(Dtype::Float32)?
        } else {
            uploads::float(f32::NEG_INFINITY)
        };
        Ok([output, broadcast_to(lse, &[count, heads])?])
    }
}

impl Dispatched for Problem {
    const OP: &'static str = "paged_attention";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.operands.queries.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => Some("MLX has no attention over blocks"),
            Backend::Kernel => context.obstacle.or_else(|| kernel::refusal(self)),
            Backend::Reference => None,
        }
    }
}

/// `[N + 1]`: the caller's, or one query for each sequence.
fn starts(check: Check, queries: &Array, sequences: i32, given: Option<&Array>) -> Result<Array> {
    let Some(starts) = given else {
        let count = queries.dim(0);
        let expected = format_args!("have one query for each of N = {sequences} sequences");
        check.value(count == sequences, "queries", expected, count)?;
        return Ok(arange::<i32, i32>(None, sequences + 1, None)?);
    };
    check.dtype_among("query_starts", starts, &[Dtype::Int32])?;
    check.shape("query_starts", starts, axes![sequences + 1])?;
    Ok(starts.clone())
}

/// Those that blocks of 8 bits must have, and others must not.
fn scales(
    check: Check,
    name: &'static str,
    given: Option<&Array>,
    blocks: &Array,
) -> Result<Array> {
    let needed = BlockForm::of(blocks.dtype()).is_scaled();
    let expected =
        if needed { "be given for blocks of 8 bits" } else { "be none for plain blocks" };
    let found = if given.is_some() { "some" } else { "none" };
    check.value(given.is_some() == needed, name, expected, found)?;
    let Some(scales) = given else {
        return Ok(stand_in(Dtype::Float32, 3));
    };
    check.dtype_among(name, scales, &[Dtype::Float32])?;
    let rows = if scales.ndim() == 3 && scales.dim(1) == 1 { 1 } else { blocks.dim(1) };
    check.shape(name, scales, axes![blocks.dim(0), rows, blocks.dim(2)])?;
    Ok(scales.clone())
}

fn check_rule(check: Check, options: &PagedAttentionOptions, heads: i32) -> Result<()> {
    if let Some(soft_cap) = options.soft_cap {
        check.positive("soft_cap", soft_cap)?;
    }
    for (name, side) in
        [("window.left", options.window.left), ("window.right", options.window.right)]
    {
        check.at_least(name, side.unwrap_or(0), 0)?;
    }
    for (name, by_head) in [("alibi_slopes", options.alibi_slopes), ("sinks", options.sinks)] {
        if let Some(by_head) = by_head {
            check.floating(name, by_head)?;
            check.shape(name, by_head, axes![heads])?;
        }
    }
    Ok(())
}
