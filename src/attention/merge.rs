//! Attention over parts of the keys, joined.

use mlx_rs::{
    Array, Dtype,
    ops::{maximum, select},
    stop_gradient,
};

use crate::{check::Check, error::Result, layout::Layout, uploads};

/// Joins results of attention over disjoint keys into the result over all of them.
///
/// `lse = log Σₙ exp(lseₙ)` and `y = Σₙ exp(lseₙ − lse) · yₙ`, over `n` states in any number and order. Where a state's
/// log-sum-exp is −∞ it saw no key, and nothing of it is read; where all are, the result is zero and −∞.
///
/// So keys may be attended to in parts, on several devices, or for a common prefix once. Gradients flow into outputs and
/// log-sum-exps, and are zero for states that saw no key.
///
/// # Shapes
/// In [`Layout::Bshd`]; [`Layout::Bhsd`] swaps the axes of sequence and heads in outputs.
/// - each state: an output `[B, S_q, H, D_v]`, f32, f16 or bf16, and its log-sum-exp `[B, H, S_q]`, f32, as
///   [`flash_attention_with_lse`](super::flash_attention_with_lse) returns them
/// - results: the same
///
/// # Errors
/// When there is no state, or when an array differs from those of the first state in shape or dtype.
///
/// # Example
/// ```
/// use mlx_primitives::{Layout, attention::{flash_attention, flash_attention_with_lse, merge_states}};
/// use mlx_rs::{Array, ops::concatenate};
///
/// let queries = Array::ones::<f32>(&[1, 3, 8, 64])?;
/// let (first, second) = (Array::ones::<f32>(&[1, 10, 8, 64])?, Array::zeros::<f32>(&[1, 5, 8, 64])?);
/// let states = [&first, &second].map(|keys| flash_attention_with_lse(&queries, keys, keys, Default::default()));
/// let (y, _) = merge_states(&states.into_iter().collect::<Result<Vec<_>, _>>()?, Layout::Bshd)?;
///
/// let all = concatenate(&[&first, &second], 1)?;
/// let whole = flash_attention(&queries, &all, &all, Default::default())?;
/// assert!(y.all_close(whole, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops in f32; the output is rounded once more, on top of what rounded the states'.
pub fn merge_states(states: &[(Array, Array)], layout: Layout) -> Result<(Array, Array)> {
    let dtype = check_states(states, layout)?;
    let states = states.iter().map(|(output, lse)| {
        Ok(State { output: layout.swap_with_bhsd(output)?, lse: lse.clone() })
    });
    let State { output, lse } = merge(&states.collect::<Result<Vec<_>>>()?)?;
    Ok((layout.swap_with_bhsd(&output)?.as_dtype(dtype)?, lse))
}

/// Returns the dtype of the outputs.
fn check_states(states: &[(Array, Array)], layout: Layout) -> Result<Dtype> {
    let check = Check::op("merge_states");
    let (first, _) = check.known(states.first(), "states", "hold one or more", "none")?;
    let dtype = check.floating("output", first)?;
    check.shape("output", first, &layout.axes("B", "S_q", "H", "D_v"))?;
    let [batch, length, heads, _] = layout.dims(first);
    for (output, lse) in states {
        check.dtype_among("output", output, &[dtype])?;
        check.same_shape("output", output, first)?;
        check.dtype_among("lse", lse, &[Dtype::Float32])?;
        check.shape("lse", lse, &[batch, heads, length].map(Into::into))?;
    }
    Ok(dtype)
}

/// Attention over some keys.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// `[B, H, S_q, D_v]`.
    pub(super) output: Array,
    /// `[B, H, S_q]`, f32.
    pub(super) lse: Array,
}

/// The state over the keys of all `states`, of which there is one at least; its output is f32.
pub(super) fn merge(states: &[State]) -> Result<State> {
    let none = uploads::float(f32::NEG_INFINITY);
    let mut largest = none.clone();
    for state in states {
        largest = maximum(&largest, &state.lse)?;
    }
    // The result is the same whatever is subtracted, and so is its gradient.
    let base = stop_gradient(or_zero(&largest)?)?;

    let (mut output, mut total) = (uploads::float(0.0), uploads::float(0.0));
    for state in states {
        let weight = weight_beside(&state.lse, &base)?;
        total = total.add(&weight)?;
        let (seen, weight) = (saw_keys(&state.lse)?.expand_dims(-1)?, weight.expand_dims(-1)?);
        let shown = select(seen, &state.output, uploads::float(0.0))?;
        output = output.add(shown.as_dtype(Dtype::Float32)?.multiply(weight)?)?;
    }
    let any = total.ne(uploads::float(0.0))?;
    let divisor = select(&any, total, uploads::float(1.0))?;
    let lse = select(any, base.add(divisor.log()?)?, none)?;
    Ok(State { output: output.divide(divisor.expand_dims(-1)?)?, lse })
}

/// `exp(lse − base)` for a finite base, and zero without a gradient where the log-sum-exp is −∞.
pub(super) fn weight_beside(lse: &Array, base: &Array) -> Result<Array> {
    let seen = saw_keys(lse)?;
    // Chosen before and after: a power of what is not finite would spoil the gradient.
    let power = select(&seen, lse, base)?.subtract(base)?.exp()?;
    Ok(select(seen, power, uploads::float(0.0))?)
}

/// A log-sum-exp, and zero where it is −∞.
pub(super) fn or_zero(lse: &Array) -> Result<Array> {
    Ok(select(saw_keys(lse)?, lse, uploads::float(0.0))?)
}

fn saw_keys(lse: &Array) -> Result<Array> {
    Ok(lse.ne(uploads::float(f32::NEG_INFINITY))?)
}
