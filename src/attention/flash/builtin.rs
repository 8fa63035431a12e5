//! MLX's fused op, kept from what it answers NaN or a mean to.

use mlx_rs::{
    Array,
    fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention},
    ops::{indexing::TryIndexOp, pad},
};

use super::{
    problem::{Attended, Problem},
    visible::Visible,
};
use crate::{attention::heads::with_positive_scale, error::Result};

pub(super) fn attend(problem: &Problem) -> Result<Attended> {
    let output = if problem.is_plain() { plain(problem)? } else { masked(problem)? };
    Ok(Attended { output, lse: None })
}

/// Without a mask array: queries that come before every key are left out, and get their zeros afterwards.
fn plain(problem: &Problem) -> Result<Array> {
    let before = problem.dims.queries_before_keys(problem.window);
    let queries = match before {
        0 => problem.queries.clone(),
        _ => problem.queries.try_index((.., .., before.., ..))?,
    };
    // A single query is the last one, which sees every key.
    let causal = problem.window.right.is_some() && problem.dims.query_length - before > 1;
    let attended = fused(problem, &queries, causal.then_some(Mask::Causal))?;
    match before {
        0 => Ok(attended),
        _ => Ok(pad(&attended, &[(0, 0), (0, 0), (before, 0), (0, 0)], None, None)?),
    }
}

fn masked(problem: &Problem) -> Result<Array> {
    let visible = Visible::new(problem)?;
    let mask = visible.as_mask(problem.dtype)?;
    let attended = fused(problem, &problem.queries, mask.as_ref().map(Mask::Array))?;
    visible.clear_hidden_rows(attended, None)
}

fn fused(problem: &Problem, queries: &Array, mask: Option<Mask>) -> Result<Array> {
    let Problem { keys, values, scale, dtype, .. } = problem;
    let sinks = problem.sinks.map(|sinks| sinks.as_dtype(*dtype)).transpose()?;
    let (queries, scale) = with_positive_scale(queries, *scale)?;
    Ok(scaled_dot_product_attention(queries, keys, values, scale, mask, sinks.as_ref())?)
}
