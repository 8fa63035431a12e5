mod h3;
mod mamba;
mod mamba2;
mod s4;

use std::collections::HashMap;

use mlx_primitives::ssm::DiagonalSsm;
use mlx_rs::{
    Array,
    module::ModuleParameters,
    ops::{concatenate, indexing::IndexOp},
};

use crate::support::{
    compare::{Tolerance, assert_close},
    tensor::Tensor,
};

type Weights = HashMap<String, Tensor>;

fn weights(module: &impl ModuleParameters) -> Weights {
    let parameters = module.parameters().flatten();
    parameters.into_iter().map(|(name, array)| (name.to_string(), Tensor::of(array))).collect()
}

fn times(weight: &Tensor, x: &[f64]) -> Vec<f64> {
    weight.rows().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Checks that a prompt at once and then token by token gives what one long call gives.
fn assert_steps_follow_prompts(
    what: &str,
    x: &Array,
    whole: &Array,
    mut prompt: impl FnMut(&Array) -> Array,
    mut step: impl FnMut(&Array) -> Array,
) {
    let half = x.dim(1) / 2;
    let mut outputs = vec![prompt(&x.index((.., ..half)))];
    for t in half..x.dim(1) {
        outputs.push(step(&x.index((.., t))).expand_dims(1).unwrap());
    }
    let joined = concatenate(&outputs, 1).unwrap();
    assert_close(what, &joined, &Tensor::of(whole), Tolerance::LAYER);
}

/// The recurrence of each channel of `[B, L, H]`, in complex numbers of f64.
fn diagonal_oracle(ssm: &DiagonalSsm, u: &Tensor) -> Tensor {
    let [log_dt, rates, frequencies, c, d] =
        [&ssm.log_dt, &ssm.log_A_real, &ssm.A_imag, &ssm.C, &ssm.D].map(|array| Tensor::of(array));
    let [batch, length, channels] = u.shape[..] else { panic!("u is [B, L, H]") };
    let pairs = rates.shape[1];
    let times = |a: [f64; 2], b: [f64; 2]| [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]];
    let mut y = u.clone();
    for row in 0..batch {
        for h in 0..channels {
            let dt = log_dt.at(&[h]).exp();
            let mut held = vec![[0.0; 2]; pairs];
            for t in 0..length {
                let now = u.at(&[row, t, h]);
                let mut sum = d.at(&[h]) * now;
                for (n, state) in held.iter_mut().enumerate() {
                    let a = [-rates.at(&[h, n]).exp(), frequencies.at(&[h, n])];
                    let size = (dt * a[0]).exp();
                    let decay = [size * (dt * a[1]).cos(), size * (dt * a[1]).sin()];
                    let norm = a[0] * a[0] + a[1] * a[1];
                    let inverse = [a[0] / norm, -a[1] / norm];
                    let gain = times([decay[0] - 1.0, decay[1]], inverse);
                    let kept = times(decay, *state);
                    *state = [kept[0] + gain[0] * now, kept[1] + gain[1] * now];
                    sum += 2.0 * times([c.at(&[h, n, 0]), c.at(&[h, n, 1])], *state)[0];
                }
                y.values[(row * length + t) * channels + h] = sum;
            }
        }
    }
    y
}
