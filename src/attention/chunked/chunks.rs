//! One chunk after another, forward and back.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, indexing::TryIndexOp, ones_like, zeros_like},
    transforms::fallible_vjp,
};

use super::{Problem, Sight};
use crate::{
    attention::{
        flash::{FlashAttentionOptions, flash_attention_with_lse},
        merge::{State, merge, or_zero, weight_beside},
    },
    dispatch::{Context, Target},
    error::Result,
    ffi::{after, exactly},
    kernel::{Vjp, differentiable},
    layout::Layout,
};

/// In the layout of the call.
pub(super) fn attend(problem: &Problem) -> Result<Array> {
    // There MLX multiplies half precision without BLAS.
    let on_cpu = Context::current()?.target == Target::Cpu;
    let dtype = if on_cpu { Dtype::Float32 } else { problem.dtype };
    let operand = |array: &Array| problem.layout.swap_with_bhsd(array)?.as_dtype(dtype);
    let (queries, keys) = (operand(problem.queries)?, operand(problem.keys)?);
    let inputs = [&queries, &keys, &operand(problem.values)?];
    let Problem { scale, chunk_size, sight, .. } = *problem;
    let chunked = Chunked { scale, chunk_size, sight, in_order: true };
    // Forward mode knows no order.
    let reference = Chunked { in_order: false, ..chunked };
    let [output, _] = differentiable(
        inputs,
        move |inputs| chunked.forward(inputs),
        move |vjp| chunked.backward(vjp),
        move |inputs| reference.forward(inputs),
    )?;
    Ok(problem.layout.swap_with_bhsd(&output.as_dtype(problem.dtype)?)?)
}

/// How to attend between `[B, H, S, D]` arrays.
#[derive(Debug, Clone, Copy)]
struct Chunked {
    scale: f32,
    chunk_size: i32,
    sight: Sight,
    /// Whether a chunk waits for the one before, so that one at a time is in memory.
    in_order: bool,
}

impl Chunked {
    /// The ends of the chunks that any query sees, in order; one at least.
    fn chunks(&self, [queries, keys, _]: &[Array; 3]) -> Vec<(i32, i32)> {
        let end = self.sight.end(queries.dim(2), keys.dim(2)).max(1);
        let starts = (0..end).step_by(self.chunk_size as usize);
        starts.map(|start| (start, start.saturating_add(self.chunk_size).min(end))).collect()
    }

    /// Output, f32, and log-sum-exp.
    fn forward(&self, inputs: &[Array; 3]) -> Result<[Array; 2]> {
        let mut done: Option<State> = None;
        for chunk in self.chunks(inputs) {
            let part = part_of(inputs, chunk)?;
            done = Some(match done {
                None => merge(&[self.state(&part, chunk)?])?,
                Some(done) => {
                    let part = self.after(part, [&done.output, &done.lse])?;
                    let next = self.state(&part, chunk)?;
                    merge(&[done, next])?
                }
            });
        }
        let State { output, lse } = done.ok_or_else(|| Exception::custom("there is no chunk"))?;
        Ok([output, lse])
    }

    fn after<'a>(
        &self,
        part: [Array; 3],
        earlier: impl IntoIterator<Item = &'a Array>,
    ) -> Result<[Array; 3]> {
        if !self.in_order {
            return Ok(part);
        }
        Ok(exactly(after(part, earlier)?)?)
    }

    /// Attention to the keys of one chunk, cut out.
    fn state(
        &self,
        [queries, keys, values]: &[Array; 3],
        (start, end): (i32, i32),
    ) -> Result<State> {
        let mask = self.sight.of(queries.dim(2), start, end)?;
        let options = FlashAttentionOptions {
            scale: Some(self.scale),
            mask: mask.as_ref(),
            layout: Layout::Bhsd,
            ..Default::default()
        };
        let (output, lse) = flash_attention_with_lse(queries, keys, values, options)?;
        Ok(State { output, lse })
    }

    fn backward(&self, vjp: Vjp<'_, 3, 2>) -> Result<[Array; 3]> {
        let [queries, keys, values] = vjp.inputs;
        let [output, lse] = vjp.outputs;
        let [d_output, d_lse] = vjp.cotangents;
        let past = d_output.multiply(output)?.sum_axis(-1, false)?.subtract(d_lse)?;
        let whole = Whole { base: &or_zero(lse)?, d_output, past: &past };

        let mut d_queries = zeros_like(queries)?.as_dtype(Dtype::Float32)?;
        let (mut d_keys, mut d_values) = (Vec::new(), Vec::new());
        for chunk in self.chunks(vjp.inputs) {
            let earlier = [d_keys.last(), d_values.last()].into_iter().flatten();
            let earlier = earlier.chain([&d_queries]);
            let part = self.after(part_of(vjp.inputs, chunk)?, earlier)?;
            let [d_query, d_key, d_value] = self.gradients(part, chunk, whole)?;
            d_queries = d_queries.add(d_query)?;
            d_keys.push(d_key);
            d_values.push(d_value);
        }
        Ok([d_queries.as_dtype(queries.dtype())?, filled(d_keys, keys)?, filled(d_values, values)?])
    }

    /// What one chunk contributes to the gradient of the queries, and the gradients of its keys and values.
    fn gradients(&self, part: [Array; 3], chunk: (i32, i32), whole: Whole) -> Result<[Array; 3]> {
        let contribution = |part: &[Array]| -> Result<Vec<Array>, Exception> {
            let part = exactly(part.to_vec())?;
            Ok(vec![whole.contribution(&self.state(&part, chunk)?)?])
        };
        let ones = ones_like(whole.past)?;
        let (_, gradients) = fallible_vjp(contribution, &part, &[ones])?;
        Ok(exactly(gradients)?)
    }
}

/// What is known of all chunks when the gradient of one is computed.
#[derive(Debug, Clone, Copy)]
struct Whole<'a> {
    /// The log-sum-exp, and zero where no key is seen.
    base: &'a Array,
    d_output: &'a Array,
    /// `d_output · output − d_lse` for each query.
    past: &'a Array,
}

impl Whole<'_> {
    /// `[B, H, S_q]`: a function of one chunk's state whose gradient is that of the whole.
    ///
    /// With `w = exp(lseₙ − lse)` the gradient of the whole is `w · d_output` for the chunk's output, and
    /// `w · (d_output · outputₙ − d_output · output + d_lse)` for its log-sum-exp. Those are the derivatives of
    /// `w · (d_output · outputₙ − past)` with all but the chunk's state held fast.
    fn contribution(&self, state: &State) -> Result<Array> {
        let weight = weight_beside(&state.lse, self.base)?;
        let product = state.output.as_dtype(Dtype::Float32)?.multiply(self.d_output)?;
        Ok(product.sum_axis(-1, false)?.subtract(self.past)?.multiply(weight)?)
    }
}

/// Queries, and the keys and values of one chunk.
fn part_of([queries, keys, values]: &[Array; 3], (start, end): (i32, i32)) -> Result<[Array; 3]> {
    let chunk = |array: &Array| array.try_index((.., .., start..end, ..));
    Ok([queries.clone(), chunk(keys)?, chunk(values)?])
}

/// The gradients of chunks one after another, and zeros for what no query sees.
fn filled(mut chunks: Vec<Array>, like: &Array) -> Result<Array> {
    let covered: i32 = chunks.iter().map(|chunk| chunk.dim(2)).sum();
    if covered < like.dim(2) {
        chunks.push(zeros_like(like.try_index((.., .., covered.., ..))?)?);
    }
    Ok(concatenate(&chunks, 2)?)
}
