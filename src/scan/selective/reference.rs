//! The definition, in plain MLX ops: a block of steps at a time, and one step after another in it.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, logaddexp, sigmoid, zeros},
};

use super::problem::{Operands, Rule};
use crate::{
    error::Result,
    ffi::{checkpoint, exactly},
};

/// Steps of a block: what is computed for all of them at once is this many times the state.
const BLOCK: i32 = 64;

/// `[B, L, D]` of the dtype of `u`, and the final states, f32.
pub(super) fn scan(operands: &Operands<&Array>, rule: &Rule) -> Result<[Array; 2]> {
    let u = operands.u.as_dtype(Dtype::Float32)?;
    let delta = steps(operands, rule)?;
    let [a, b, c] = [operands.a, operands.b, operands.c].map(|x| x.as_dtype(Dtype::Float32));
    let inputs = Inputs { entering: delta.multiply(&u)?, delta, a: a?, b: b?, c: c? };
    let state = rule.started.then_some(operands.state);
    let [mut y, state] = match &rule.segments {
        None => inputs.run(state)?,
        Some(segments) => inputs.run_segments(segments, state)?,
    };
    if rule.skips {
        y = y.add(u.multiply(operands.d.as_dtype(Dtype::Float32)?)?)?;
    }
    if rule.gated {
        let z = operands.z.as_dtype(Dtype::Float32)?;
        y = y.multiply(z.multiply(sigmoid(&z)?)?)?;
    }
    Ok([y.as_dtype(operands.u.dtype())?, state])
}

/// `Δ`, f32.
fn steps(operands: &Operands<&Array>, rule: &Rule) -> Result<Array> {
    let mut delta = operands.delta.as_dtype(Dtype::Float32)?;
    if rule.biased {
        delta = delta.add(operands.bias.as_dtype(Dtype::Float32)?)?;
    }
    Ok(if rule.softplus { logaddexp(delta, Array::from_f32(0.0))? } else { delta })
}

/// All in f32, with the batch first.
struct Inputs {
    /// `[B, L, D]`, as `entering`, which is `delta · u`.
    delta: Array,
    entering: Array,
    /// `[D, N]`.
    a: Array,
    /// `[B, L, G, N]`, as `c`.
    b: Array,
    c: Array,
}

impl Inputs {
    /// Each segment by itself.
    fn run_segments(&self, segments: &[i32], state: Option<&Array>) -> Result<[Array; 2]> {
        let inner = &segments[1..segments.len() - 1];
        let parts = |array: &Array| array.split_at_indices(inner, 1);
        let (delta, entering) = (parts(&self.delta)?, parts(&self.entering)?);
        let (b, c) = (parts(&self.b)?, parts(&self.c)?);
        let states = state.map(|state| state.split_equal(state.dim(0), 0)).transpose()?;
        let (mut outputs, mut ends) = (Vec::new(), Vec::new());
        for i in 0..delta.len() {
            let part = Self {
                delta: delta[i].clone(),
                entering: entering[i].clone(),
                a: self.a.clone(),
                b: b[i].clone(),
                c: c[i].clone(),
            };
            let [y, end] = part.run(states.as_ref().map(|states| &states[i]))?;
            outputs.push(y);
            ends.push(end);
        }
        Ok([concatenate(&outputs, 1)?, concatenate(&ends, 0)?])
    }

    /// Each row of the batch from its own state.
    fn run(&self, state: Option<&Array>) -> Result<[Array; 2]> {
        let (batch, length) = (self.delta.dim(0), self.delta.dim(1));
        let shape = [batch, self.a.dim(0), self.a.dim(1)];
        let mut state = state.map_or_else(|| zeros::<f32>(&shape), |state| Ok(state.clone()))?;
        if length == 0 {
            return Ok([self.delta.clone(), state]);
        }
        let cuts: Vec<_> = (BLOCK..length).step_by(BLOCK as usize).collect();
        let by_time = |array: &Array| array.swap_axes(0, 1)?.split_at_indices(&cuts, 0);
        let (delta, entering) = (by_time(&self.delta)?, by_time(&self.entering)?);
        let (b, c) = (by_time(&self.b)?, by_time(&self.c)?);
        let mut outputs = Vec::new();
        for i in 0..delta.len() {
            let inputs = [&state, &delta[i], &entering[i], &self.a, &b[i], &c[i]].map(Array::clone);
            // A gradient keeps none of the states of a block, but computes them again.
            let results =
                if cuts.is_empty() { block(&inputs)? } else { checkpoint(block, inputs)? };
            let [y, end] = exactly(results)?;
            outputs.push(y);
            state = end;
        }
        Ok([concatenate(&outputs, 0)?.swap_axes(0, 1)?, state])
    }
}

/// The outputs of a block of steps, `[Q, B, D]`, and the state after it.
///
/// Of the state before it, `[B, D, N]`, of `delta` and `entering`, `[Q, B, D]`, of `a`, and of `b` and `c`,
/// `[Q, B, G, N]`.
fn block(inputs: &[Array]) -> Result<Vec<Array>, Exception> {
    let [state, delta, entering, a, b, c] = &exactly(inputs.to_vec())?;
    let (steps, batch, channels) = (delta.dim(0), delta.dim(1), delta.dim(2));
    let (groups, states) = (b.dim(2), b.dim(3));
    let by_group = [steps, batch, groups, channels / groups, 1];
    let decays = delta.expand_dims(-1)?.multiply(a)?.exp()?;
    let added = entering.reshape(&by_group)?.multiply(b.expand_dims(-2)?)?;
    let added = added.reshape(&[steps, batch, channels, states])?;
    let (decays, added) = (decays.split_equal(steps, 0)?, added.split_equal(steps, 0)?);
    let mut reached: Vec<Array> = Vec::new();
    for (decay, added) in decays.iter().zip(&added) {
        let before = reached.last().unwrap_or(state);
        reached.push(decay.multiply(before)?.add(added)?);
    }
    let end = reached.last().unwrap_or(state).reshape(&[batch, channels, states])?;
    let by_group = [steps, batch, groups, channels / groups, states];
    let y = concatenate(&reached, 0)?.reshape(&by_group)?.matmul(c.expand_dims(-1)?)?;
    Ok(vec![y.reshape(&[steps, batch, channels])?, end])
}
