//! Blocks of queries, each over the stretch of keys that it sees, by MLX's fused op.

use std::ops::Range;

use mlx_rs::{
    Array, Dtype,
    fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention},
    ops::{concatenate, indexing::TryIndexOp, pad, select, tri},
};

use super::{
    Problem,
    overlap::Overlap,
    plan::{Band, Plan, Span},
};
use crate::{
    attention::heads::with_positive_scale,
    dispatch::{Context, Target},
    error::Result,
    layout::Layout,
    uploads,
};

/// In the layout of the call.
pub(super) fn attend(problem: &Problem) -> Result<Array> {
    let target = Context::current()?.target;
    let operands = Operands::new(problem, target)?;
    let block = block(target);
    let plan = Plan::new(&problem.band, block);
    let parts = [
        operands.dense(plan.head)?,
        operands.in_blocks(plan.blocks, block)?,
        operands.dense(plan.tail)?,
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    let hidden = problem.band.hidden_rows();
    let attended = match &parts[..] {
        [] => return problem.zeros(),
        [part] => part.clone(),
        parts => concatenate(parts, 2)?,
    };
    let attended = match hidden {
        0 => attended,
        hidden => pad(&attended, &[(0, 0), (0, 0), (hidden, 0), (0, 0)], None, None)?,
    };
    Ok(problem.layout.swap_with_bhsd(&attended.as_dtype(problem.dtype)?)?)
}

/// How many queries share a stretch of keys: the fastest of 32 to 256 on a two-core CPU.
fn block(target: Target) -> i32 {
    match target {
        Target::Cpu => 64,
        Target::Metal | Target::Cuda => 128,
    }
}

/// Queries, keys and values in the layout of the call, as MLX is to multiply them.
struct Operands {
    queries: Array,
    keys: Array,
    values: Array,
    /// Above zero.
    scale: f32,
    band: Band,
    layout: Layout,
}

impl Operands {
    /// On a CPU MLX multiplies half precision without BLAS and rounds the scores to it.
    fn new(problem: &Problem, target: Target) -> Result<Self> {
        let dtype = if target == Target::Cpu { Dtype::Float32 } else { problem.dtype };
        let queries = problem.queries.as_dtype(dtype)?;
        let (queries, scale) = with_positive_scale(&queries, problem.scale)?;
        let (keys, values) = (problem.keys.as_dtype(dtype)?, problem.values.as_dtype(dtype)?);
        let (band, layout) = (problem.band, problem.layout);
        Ok(Self { queries, keys, values, scale, band, layout })
    }

    /// `[B, H, rows, D_v]` of these queries, from one product with all the keys they see.
    fn dense(&self, rows: Range<i32>) -> Result<Option<Array>> {
        if rows.is_empty() {
            return Ok(None);
        }
        let span = self.band.span(rows);
        let queries = rows_of(&self.queries, self.layout, &span.rows)?;
        let keys = rows_of(&self.keys, self.layout, &span.keys)?;
        let values = rows_of(&self.values, self.layout, &span.keys)?;
        self.fused(&queries, &keys, &values, &span).map(Some)
    }

    /// `[B, H, rows, D_v]` of these queries, `block` at a time. None sees the end of a sequence.
    fn in_blocks(&self, rows: Range<i32>, block: i32) -> Result<Option<Array>> {
        if rows.is_empty() {
            return Ok(None);
        }
        let batch = self.queries.dim(0);
        let sequences = if self.copies_little(block) { 1 } else { batch };
        let split = |array: &Array| array.split_equal(sequences, 0);
        let (queries, keys) = (split(&self.queries)?, split(&self.keys)?);
        let values = split(&self.values)?;
        let attended = queries
            .iter()
            .zip(keys.iter().zip(&values))
            .map(|(queries, (keys, values))| self.folded([queries, keys, values], &rows, block));
        let attended = attended.collect::<Result<Vec<_>>>()?;
        Ok(Some(concatenate(&attended, 0)?))
    }

    /// Whether stretches of keys may be copied, which MLX does to more than one sequence, or else
    /// sequences go one by one.
    fn copies_little(&self, block: i32) -> bool {
        self.band.width() <= block + 1
    }

    fn folded(
        &self,
        [queries, keys, values]: [&Array; 3],
        rows: &Range<i32>,
        block: i32,
    ) -> Result<Array> {
        let (batch, count) = (queries.dim(0), rows.len() as i32 / block);
        let span = self.band.span(rows.start..rows.start + block);
        let stretch = span.keys.len() as i32;
        let own = Overlap { start: rows.start, step: block, count, length: block };
        let seen = Overlap { start: span.keys.start, step: block, count, length: stretch };
        let attended = self.fused(
            &own.view(queries, self.layout)?,
            &seen.view(keys, self.layout)?,
            &seen.view(values, self.layout)?,
            &span,
        )?;
        let shape = [&[batch, count], &attended.shape()[1..]].concat();
        Ok(attended.reshape(&shape)?.swap_axes(1, 2)?.flatten(2, 3)?)
    }

    /// MLX's op between `[B, H, S, D]` arrays.
    fn fused(&self, queries: &Array, keys: &Array, values: &Array, span: &Span) -> Result<Array> {
        let band;
        let mask = if span.is_causal() {
            Some(ScaledDotProductAttentionMask::Causal)
        } else if span.hides_early_keys() || span.hides_late_keys() {
            band = additive(&visible(span)?, queries.dtype())?;
            Some(ScaledDotProductAttentionMask::Array(&band))
        } else {
            None
        };
        Ok(scaled_dot_product_attention(queries, keys, values, self.scale, mask, None)?)
    }
}

/// Some rows, as `[B, H, rows, D]`.
fn rows_of(array: &Array, layout: Layout, rows: &Range<i32>) -> Result<Array> {
    Ok(layout.swap_with_bhsd(array)?.try_index((.., .., rows.clone(), ..))?)
}

/// `[rows, keys]`, true where a query sees a key.
fn visible(span: &Span) -> Result<Array> {
    let (rows, keys) = (span.rows.len() as i32, span.keys.len() as i32);
    let up_to = |diagonal| tri::<bool>(rows, Some(keys), Some(diagonal));
    Ok(up_to(span.highest)?.logical_and(up_to(span.lowest - 1)?.logical_not()?)?)
}

/// Zero where a query sees a key, for MLX is far slower with booleans on an NVIDIA GPU.
fn additive(visible: &Array, dtype: Dtype) -> Result<Array> {
    let scores = [0.0, f32::NEG_INFINITY].map(|score| uploads::float(score).as_dtype(dtype));
    let [shown, hidden] = scores;
    Ok(select(visible, shown?, hidden?)?)
}
