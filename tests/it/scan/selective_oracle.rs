//! The selective scan in loops over f64.

use crate::support::tensor::Tensor;

/// The arguments, in the order in which the tests pass them: `u`, `delta`, `a`, `b`, `c`, then `d`, `z`, `delta_bias` and
/// the initial state where there are such.
pub(super) struct Arguments<'a> {
    pub(super) u: &'a Tensor,
    pub(super) delta: &'a Tensor,
    pub(super) a: &'a Tensor,
    pub(super) b: &'a Tensor,
    pub(super) c: &'a Tensor,
    pub(super) d: Option<&'a Tensor>,
    pub(super) z: Option<&'a Tensor>,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) state: Option<&'a Tensor>,
    pub(super) softplus: bool,
    pub(super) segments: Option<&'a [i32]>,
}

/// Outputs and final states.
pub(super) fn scan(given: &Arguments) -> (Tensor, Tensor) {
    let [batch, length, channels] = given.u.shape[..] else { panic!("u is [B, L, D]") };
    let states = given.a.shape[1];
    let sequences: Vec<(usize, usize, usize)> = match given.segments {
        None => (0..batch).map(|row| (row, 0, length)).collect(),
        Some(cuts) => cuts.windows(2).map(|pair| (0, pair[0] as usize, pair[1] as usize)).collect(),
    };
    let mut y = Tensor::new(&given.u.shape, vec![0.0; given.u.values.len()]);
    let mut last = Vec::new();
    for (which, &(row, begin, end)) in sequences.iter().enumerate() {
        for channel in 0..channels {
            let mut state: Vec<_> = (0..states)
                .map(|n| given.state.map_or(0.0, |state| state.at(&[which, channel, n])))
                .collect();
            for t in begin..end {
                let at = (row * length + t) * channels + channel;
                y.values[at] = step(given, [row, t, channel], &mut state);
            }
            last.extend(state);
        }
    }
    (y, Tensor::new(&[sequences.len(), channels, states], last))
}

fn step(given: &Arguments, at: [usize; 3], state: &mut [f64]) -> f64 {
    let [row, t, channel] = at;
    let by_state = |array: &Tensor, n: usize| match array.shape[..] {
        [_, _, groups, _] => array.at(&[row, t, channel / (given.u.shape[2] / groups), n]),
        _ => array.at(&[row, t, n]),
    };
    let u = given.u.at(&at);
    let mut delta = given.delta.at(&at) + given.bias.map_or(0.0, |bias| bias.at(&[channel]));
    if given.softplus {
        delta = delta.max(0.0) + (-delta.abs()).exp().ln_1p();
    }
    let mut y = given.d.map_or(0.0, |d| d.at(&[channel])) * u;
    for (n, held) in state.iter_mut().enumerate() {
        let decay = (delta * given.a.at(&[channel, n])).exp();
        *held = decay * *held + delta * by_state(given.b, n) * u;
        y += by_state(given.c, n) * *held;
    }
    y * given.z.map_or(1.0, |z| z.at(&at) / (1.0 + (-z.at(&at)).exp()))
}
