//! The scan by one pass that keeps states in registers.

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, zeros},
};

use super::{GatedLinearOptions, Linear, Problem};
use crate::{
    attention::with_positive_scale,
    check::Check,
    dispatch::Dispatched,
    error::Result,
    kernel::{differentiable_by_reference, stand_in},
    scan::fading::kernel::FadingScan,
};

pub(super) fn scan(linear: &Linear) -> Result<(Array, Array)> {
    let [queries, keys, values] = linear.0.arrays;
    let GatedLinearOptions { log_decay, initial_state, chunk_size, .. } = linear.0.options;
    let (fades, started) = (log_decay.is_some(), initial_state.is_some());
    let given = Given { fades, started, chunk_size, scale: linear.0.scale };
    let none = stand_in(Dtype::Float32, 1);
    let [decay, state] = [log_decay, initial_state].map(|array| array.unwrap_or(&none));
    let [y, state] = differentiable_by_reference(
        [queries, keys, values, decay, state],
        move |inputs| scanned(&given.problem(inputs)?),
        move |inputs| Ok(given.problem(inputs)?.by_reference()?.into()),
    )?;
    Ok((y, state))
}

/// Without a gradient.
fn scanned(linear: &Linear) -> Result<[Array; 2]> {
    let [queries, keys, values] = linear.0.arrays;
    let [batch, length, heads, ..] = linear.0.sizes;
    // A kernel is told of a scale as of an integer that is not below zero.
    let (queries, scale) = with_positive_scale(queries, linear.0.scale)?;
    let decays = match linear.0.options.log_decay {
        Some(decay) => broadcast_to(decay, &[batch, length, heads])?,
        None => zeros::<f32>(&[batch, length, heads])?,
    };
    let state = linear.0.options.initial_state;
    let scan = FadingScan {
        queries: &queries,
        keys,
        values,
        decays,
        steps: None,
        scale,
        skip: None,
        gate: None,
        state: state.map(|state| state.swap_axes(-1, -2)).transpose()?,
    };
    let [y, last] = scan.run()?;
    Ok([y, last.swap_axes(-1, -2)?])
}

/// Which options there are, and those that are no arrays: what a transform needs to see a problem again.
#[derive(Debug, Clone, Copy)]
struct Given {
    fades: bool,
    started: bool,
    chunk_size: i32,
    scale: f32,
}

impl Given {
    /// Queries, keys, values, decays and the state.
    fn problem(self, inputs: &[Array; 5]) -> Result<Linear<'_>> {
        let [queries, keys, values, decay, state] = inputs;
        let options = GatedLinearOptions {
            log_decay: self.fades.then_some(decay),
            initial_state: self.started.then_some(state),
            chunk_size: self.chunk_size,
            scale: Some(self.scale),
            ..Default::default()
        };
        Ok(Linear(Problem::new(Check::op(Linear::OP), [queries, keys, values], options)?))
    }
}
