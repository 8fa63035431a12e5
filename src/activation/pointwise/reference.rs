//! The definitions, in plain MLX ops.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{clip, erf, logaddexp, maximum, sigmoid, tanh},
};

use super::Activation;
use crate::{error::Result, uploads};

/// `inputs` is one array of any floating dtype.
pub(super) fn pointwise(activation: Activation, inputs: &[Array]) -> Result<Array> {
    let x = &inputs[0];
    Ok(activate(activation, &x.as_dtype(Dtype::Float32)?)?.as_dtype(x.dtype())?)
}

/// On f32.
pub(in crate::activation) fn activate(
    activation: Activation,
    x: &Array,
) -> Result<Array, Exception> {
    match activation {
        Activation::Identity => Ok(x.clone()),
        Activation::Relu => relu(x),
        Activation::Relu6 => clip(x, (0.0, 6.0)),
        Activation::ReluSquared => relu(x)?.square(),
        Activation::LeakyRelu => maximum(x, x.multiply(scalar(0.01))?),
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => tanh(x),
        Activation::Silu => x.multiply(sigmoid(x)?),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => gelu_tanh(x),
        Activation::QuickGelu => x.multiply(sigmoid(x.multiply(scalar(1.702))?)?),
        Activation::Mish => x.multiply(tanh(softplus(x)?)?),
        Activation::Softplus => softplus(x),
        Activation::HardSigmoid => hard_sigmoid(x),
        Activation::HardSwish => x.multiply(hard_sigmoid(x)?),
    }
}

fn relu(x: &Array) -> Result<Array, Exception> {
    maximum(x, scalar(0.0))
}

fn gelu(x: &Array) -> Result<Array, Exception> {
    let phi = erf(x.multiply(scalar(FRAC_1_SQRT_2))?)?.add(scalar(1.0))?;
    x.multiply(scalar(0.5))?.multiply(phi)
}

fn gelu_tanh(x: &Array) -> Result<Array, Exception> {
    let cubic = x.square()?.multiply(scalar(0.044_715))?.add(scalar(1.0))?.multiply(x)?;
    let phi = tanh(cubic.multiply(scalar(FRAC_2_PI.sqrt()))?)?.add(scalar(1.0))?;
    x.multiply(scalar(0.5))?.multiply(phi)
}

/// `exp(x)` alone would overflow.
fn softplus(x: &Array) -> Result<Array, Exception> {
    logaddexp(x, scalar(0.0))
}

fn hard_sigmoid(x: &Array) -> Result<Array, Exception> {
    clip(x.add(scalar(3.0))?, (0.0, 6.0))?.divide(scalar(6.0))
}

fn scalar(value: f32) -> Array {
    uploads::float(value)
}
