//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype};

use super::{Problem, reference};
use crate::{
    error::Result,
    kernel::{Argument, Kernel, Plan, Rows, Vjp, differentiable, metal, stand_in},
    norm::layer_norm::kernel::{Affine, CONSTANTS, FORWARD_BYTES, FRAGMENTS, Gradient, gradient},
};

/// The kernels of this operation alone; its gradient is that of the norm, and a little more.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD];

static FORWARD: Kernel = Kernel {
    name: "add_layer_norm",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("T", "residual", &["N", "D"]),
        Argument::of("W", "weight", &["P"]),
        Argument::of("B", "bias", &["Q"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "D"]), Argument::of("T", "sum", &["N", "D"])],
    constants: CONSTANTS,
    fragments: FRAGMENTS,
    file: metal!("norm/add_layer_norm.metal"),
};

pub(super) fn add_layer_norm(problem: &Problem) -> Result<[Array; 2]> {
    let affine = Affine::of(problem.weight, problem.bias, problem.eps);
    let [weight, bias] = [problem.weight, problem.bias]
        .map(|array| array.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1)));
    differentiable(
        [problem.x, problem.residual, &weight, &bias],
        move |inputs| forward(inputs, affine),
        move |vjp| backward(vjp, affine),
        move |[x, residual, weight, bias]| {
            let (weight, bias) = affine.present(weight, bias);
            reference::add_layer_norm(x, residual, weight, bias, affine.eps)
        },
    )
}

fn forward([x, residual, weight, bias]: &[Array; 4], affine: Affine) -> Result<[Array; 2]> {
    let matrix = x.reshape(&[-1, x.dim(-1)])?;
    let rows = Rows::packed(matrix.dim(0), matrix.dim(1), matrix.dtype()).holding(4);
    let constants = affine.constants(&rows, []);
    let plan = Plan { constants, extents: Vec::new(), launch: rows.launch(FORWARD_BYTES) };
    let residual = residual.reshape(matrix.shape())?;
    let [y, sum] = FORWARD.call(&[&matrix, &residual, weight, bias], plan)?;
    Ok([y.reshape(x.shape())?, sum.reshape(x.shape())?])
}

fn backward(vjp: Vjp<'_, 4, 2>, affine: Affine) -> Result<[Array; 4]> {
    let ([_, _, weight, bias], [_, sum], [dy, dsum]) = (vjp.inputs, vjp.outputs, vjp.cotangents);
    let of = Gradient { x: sum, weight, bias, dy, dsum: Some(dsum), affine };
    let [dx, dweight, dbias] = gradient(of)?;
    Ok([dx.clone(), dx, dweight, dbias])
}
