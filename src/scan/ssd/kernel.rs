//! The scan by one pass that keeps states in registers.

use mlx_rs::{Array, Dtype};

use super::{SsdInput, SsdOptions, delta, options::Problem};
use crate::{
    error::Result,
    kernel::{differentiable_by_reference, stand_in},
    scan::fading::kernel::FadingScan,
};

pub(super) fn scan(problem: &Problem) -> Result<(Array, Array)> {
    let (SsdInput { x, dt, a, b, c }, given) = (problem.input, Given::of(&problem.options));
    let none = stand_in(Dtype::Float32, 1);
    let SsdOptions { d, z, dt_bias, initial_state, .. } = problem.options;
    let [d, z, bias, state] = [d, z, dt_bias, initial_state].map(|array| array.unwrap_or(&none));
    let [y, state] = differentiable_by_reference(
        [x, dt, a, b, c, d, z, bias, state],
        move |inputs| scanned(&given.problem(inputs)?),
        move |inputs| Ok(given.problem(inputs)?.by_reference()?.into()),
    )?;
    Ok((y, state))
}

/// Without a gradient.
fn scanned(problem: &Problem) -> Result<[Array; 2]> {
    let SsdInput { x, dt, a, b, c } = problem.input;
    let dt = delta(dt, &problem.options)?;
    let scan = FadingScan {
        queries: c,
        keys: b,
        values: x,
        decays: dt.multiply(a.as_dtype(Dtype::Float32)?)?,
        steps: Some(dt),
        scale: 1.0,
        skip: problem.options.d,
        gate: problem.options.z,
        state: problem.options.initial_state.cloned(),
    };
    scan.run()
}

/// Which options there are, and those that are no arrays: what a transform needs to see a problem again.
#[derive(Debug, Clone, Copy)]
struct Given {
    skips: bool,
    gated: bool,
    biased: bool,
    started: bool,
    chunk_size: i32,
    dt_softplus: bool,
    dt_limit: Option<(f32, f32)>,
}

impl Given {
    fn of(options: &SsdOptions) -> Self {
        let SsdOptions { chunk_size, dt_softplus, dt_limit, .. } = *options;
        Self {
            skips: options.d.is_some(),
            gated: options.z.is_some(),
            biased: options.dt_bias.is_some(),
            started: options.initial_state.is_some(),
            chunk_size,
            dt_softplus,
            dt_limit,
        }
    }

    /// `x`, `dt`, `a`, `b`, `c`, `d`, `z`, the bias and the state.
    fn problem(self, inputs: &[Array; 9]) -> Result<Problem<'_>> {
        let [x, dt, a, b, c, d, z, bias, state] = inputs;
        let options = SsdOptions {
            d: self.skips.then_some(d),
            z: self.gated.then_some(z),
            dt_bias: self.biased.then_some(bias),
            initial_state: self.started.then_some(state),
            chunk_size: self.chunk_size,
            dt_softplus: self.dt_softplus,
            dt_limit: self.dt_limit,
            ..Default::default()
        };
        Problem::new(SsdInput { x, dt, a, b, c }, &options)
    }
}
