//! The definition, in plain MLX ops. All scores are in memory at once.

use mlx_rs::{
    Array, Dtype,
    ops::{logaddexp, logsumexp_axis, select, sigmoid, softmax_axis, tanh},
    random::bernoulli,
};

use super::{
    options::AttentionDropout,
    problem::{Attended, Problem},
    visible::Visible,
};
use crate::{error::Result, uploads};

pub(super) fn attend(problem: &Problem) -> Result<Attended> {
    let visible = Visible::new(problem)?;
    let scores = scores(problem, &visible)?;
    let weights = dropped(softmax_axis(&scores, -1, true)?, problem.dropout)?;
    let output = by_group(&weights, &problem.values.as_dtype(Dtype::Float32)?)?;

    let sinks = problem.sinks_by_row()?;
    let needs_sums = problem.wants_lse || sinks.is_some();
    let sums = needs_sums.then(|| logsumexp_axis(&scores, -1, true)).transpose()?;
    let (output, lse) = match (sinks, sums) {
        (Some(sinks), Some(sums)) => {
            let share = sigmoid(sums.subtract(&sinks)?)?;
            (output.multiply(share)?, Some(logaddexp(&sums, &sinks)?))
        }
        (_, sums) => (output, sums),
    };
    let lse = lse.filter(|_| problem.wants_lse);
    Ok(Attended {
        output: visible.clear_hidden_rows(output, None)?.as_dtype(problem.dtype)?,
        lse: lse.map(|lse| rows_of(problem, &visible, lse)).transpose()?,
    })
}

/// `[B, H, S_q, S_kv]`, f32, −∞ where a key is hidden.
fn scores(problem: &Problem, visible: &Visible) -> Result<Array> {
    let queries = problem.queries.as_dtype(Dtype::Float32)?;
    let keys = problem.keys.as_dtype(Dtype::Float32)?;
    let queries = queries.multiply(uploads::float(problem.scale))?;
    let mut scores = by_group(&queries, &keys.swap_axes(-1, -2)?)?;
    if let Some(cap) = problem.soft_cap.map(uploads::float) {
        scores = tanh(scores.divide(&cap)?)?.multiply(&cap)?;
    }
    if let Some(bias) = &visible.bias {
        scores = scores.add(bias)?;
    }
    if let Some(keys) = &visible.keys {
        scores = select(keys, scores, uploads::float(f32::NEG_INFINITY))?;
    }
    Ok(scores)
}

/// Multiplies each head of `[B, H, ...]` by its group's matrix in `[B, H_kv, ...]`: the rows of a group's heads are
/// those of one product.
fn by_group(heads: &Array, groups: &Array) -> Result<Array> {
    let [batch, count, rows, inner] = [0, 1, 2, 3].map(|axis| heads.dim(axis));
    let (kv_heads, outer) = (groups.dim(1), groups.dim(3));
    let product =
        heads.reshape(&[batch, kv_heads, count / kv_heads * rows, inner])?.matmul(groups)?;
    Ok(product.reshape(&[batch, count, rows, outer])?)
}

fn dropped(weights: Array, dropout: Option<AttentionDropout>) -> Result<Array> {
    let Some(AttentionDropout { probability, key }) = dropout else { return Ok(weights) };
    let kept = bernoulli(&uploads::float(1.0 - probability), weights.shape(), key)?;
    let grown = weights.divide(uploads::float(1.0 - probability))?;
    Ok(select(kept, grown, uploads::float(0.0))?)
}

/// The log-sum-exp as `[B, H, S_q]`; in rows that see no key, that of the sinks alone.
fn rows_of(problem: &Problem, visible: &Visible, lse: Array) -> Result<Array> {
    let empty = problem.sinks_by_row()?.unwrap_or_else(|| uploads::float(f32::NEG_INFINITY));
    Ok(visible.clear_hidden_rows(lse, Some(empty))?.squeeze_axes(&[-1])?)
}
