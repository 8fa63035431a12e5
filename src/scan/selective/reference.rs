//! The definition, in plain MLX ops: a block of steps at a time, and one step after another in it.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, logaddexp, sigmoid, zeros},
};

use super::problem::{Operands, Rule};
use crate::{
    error::Result,
    kernel::{Vjp, differentiable},
    uploads,
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
    Ok(if rule.softplus { logaddexp(delta, uploads::float(0.0))? } else { delta })
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
            let inputs = [&state, &delta[i], &entering[i], &self.a, &b[i], &c[i]];
            let [y, end] = differentiable(inputs, block, block_gradient, block)?;
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
fn block(inputs: &[Array; 6]) -> Result<[Array; 2]> {
    let [state, delta, _, _, _, c] = inputs;
    let states = States::of(inputs)?;
    let y = states.sizes.by_group(&states.after()?)?.matmul(c.expand_dims(-1)?)?;
    let end = states.reached.last().unwrap_or(state).reshape(state.shape())?;
    Ok([y.reshape(delta.shape())?, end])
}

/// The gradient of [`block`], of which nothing is kept: the states are computed anew.
///
/// MLX would derive it step by step. Only that of the states is; of all else it is a product over the whole block.
fn block_gradient(vjp: Vjp<'_, 6, 2>) -> Result<[Array; 6]> {
    let ([state, delta, entering, a, b, c], [dy, dend]) = (vjp.inputs, vjp.cotangents);
    let states = States::of(vjp.inputs)?;
    let sizes = states.sizes;
    let column = |array: &Array| array.reshape(&sizes.column());
    let row = |array: &Array| array.reshape(&sizes.row());
    let read = column(dy)?.multiply(c.expand_dims(-2)?)?.reshape(&sizes.all())?;
    let read = read.split_equal(sizes.steps, 0)?;
    let mut coming = dend.clone();
    let mut slopes = Vec::new();
    for (decay, read) in states.decays.iter().zip(&read).rev() {
        let slope = read.add(&coming)?;
        coming = decay.multiply(&slope)?;
        slopes.push(slope);
    }
    slopes.reverse();
    let slopes = concatenate(&slopes, 0)?;
    // Of the exponents delta · a, and of the products that enter.
    let moved =
        slopes.multiply(concatenate(&states.decays, 0)?)?.multiply(states.before(state)?)?;
    let slopes = sizes.by_group(&slopes)?;
    let dentering = slopes.matmul(b.expand_dims(-1)?)?;
    let db = row(entering)?.matmul(&slopes)?;
    let dc = row(dy)?.matmul(sizes.by_group(&states.after()?)?)?;
    Ok([
        coming.reshape(state.shape())?,
        moved.multiply(a)?.sum_axis(-1, false)?,
        dentering.reshape(delta.shape())?,
        moved.multiply(delta.expand_dims(-1)?)?.sum_axes(&[0, 1], false)?,
        db.reshape(b.shape())?,
        dc.reshape(c.shape())?,
    ])
}

/// What the arrays of a block are made of.
#[derive(Debug, Clone, Copy)]
struct BlockSizes {
    steps: i32,
    batch: i32,
    channels: i32,
    groups: i32,
    states: i32,
}

impl BlockSizes {
    fn all(self) -> [i32; 4] {
        [self.steps, self.batch, self.channels, self.states]
    }

    /// Of an array by channel, so that it multiplies one by state.
    fn column(self) -> [i32; 5] {
        [self.steps, self.batch, self.groups, self.channels / self.groups, 1]
    }

    /// Of an array by channel, so that it is multiplied with one by channel and state.
    fn row(self) -> [i32; 5] {
        [self.steps, self.batch, self.groups, 1, self.channels / self.groups]
    }

    /// `[Q, B, D, N]` as `[Q, B, G, D / G, N]`.
    fn by_group(self, array: &Array) -> Result<Array, Exception> {
        let [steps, batch, groups, channels, _] = self.column();
        array.reshape(&[steps, batch, groups, channels, self.states])
    }
}

/// The states of a block, each `[1, B, D, N]`.
struct States {
    sizes: BlockSizes,
    decays: Vec<Array>,
    reached: Vec<Array>,
}

impl States {
    fn of([state, delta, entering, a, b, _]: &[Array; 6]) -> Result<Self> {
        let [steps, batch, channels] = [delta.dim(0), delta.dim(1), delta.dim(2)];
        let sizes = BlockSizes { steps, batch, channels, groups: b.dim(2), states: b.dim(3) };
        let decays = delta.expand_dims(-1)?.multiply(a)?.exp()?.split_equal(steps, 0)?;
        let added = entering.reshape(&sizes.column())?.multiply(b.expand_dims(-2)?)?;
        let added = added.reshape(&sizes.all())?.split_equal(steps, 0)?;
        let mut reached: Vec<Array> = Vec::new();
        for (decay, added) in decays.iter().zip(&added) {
            let before = reached.last().unwrap_or(state);
            reached.push(decay.multiply(before)?.add(added)?);
        }
        Ok(Self { sizes, decays, reached })
    }

    fn after(&self) -> Result<Array, Exception> {
        concatenate(&self.reached, 0)
    }

    /// The state before each step.
    fn before(&self, first: &Array) -> Result<Array, Exception> {
        let first = first.expand_dims(0)?;
        let others = self.reached.iter().take(self.reached.len() - 1);
        concatenate(&[&first].into_iter().chain(others).collect::<Vec<_>>(), 0)
    }
}
