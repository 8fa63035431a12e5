//! Each activation as its paper has it, in f64.

use std::f64::consts::{PI, SQRT_2};

use mlx_primitives::activation::Activation;

pub(crate) fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Identity => x,
        Activation::Relu => x.max(0.0),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::ReluSquared => x.max(0.0) * x.max(0.0),
        Activation::LeakyRelu => {
            if x < 0.0 {
                x / 100.0
            } else {
                x
            }
        }
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / SQRT_2)),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Mish => x * softplus(x).tanh(),
        Activation::Softplus => softplus(x),
        Activation::HardSigmoid => (x / 6.0 + 0.5).clamp(0.0, 1.0),
        Activation::HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
        other => panic!("no oracle for {other}"),
    }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Simpson's rule on the integral that defines it; beyond 6 it is 1 to the last bit.
fn erf(x: f64) -> f64 {
    const STEPS: i32 = 400;
    if x.abs() > 6.0 {
        return x.signum();
    }
    let width = x / f64::from(STEPS);
    let weighted = |step: i32| {
        let t = f64::from(step) * width;
        let weight = match step {
            0 | STEPS => 1.0,
            step if step % 2 == 1 => 4.0,
            _ => 2.0,
        };
        weight * (-t * t).exp()
    };
    (0..=STEPS).map(weighted).sum::<f64>() * width / 3.0 * 2.0 / PI.sqrt()
}

#[test]
fn erf_has_its_tabulated_values() {
    for (x, expected) in
        [(0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (-2.0, -0.9953222650189527)]
    {
        assert!((erf(x) - expected).abs() < 1e-10, "{x}");
    }
}
