//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype};

use super::{Problem, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, File, Kernel, Plan, Rows, differentiable, metal, stand_in},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

/// What every kernel of this norm is made of.
pub(in crate::norm) const FRAGMENTS: &[File] = &[
    metal!("common/chunk.metal"),
    metal!("common/row.metal"),
    metal!("common/held.metal"),
    metal!("common/layer.metal"),
];

/// The constants of the forward kernels.
pub(in crate::norm) const CONSTANTS: &[&str] =
    &["SIMDS", "LANES", "CHUNKS", "EPS", "WEIGHTED", "BIASED"];

static FORWARD: Kernel = Kernel {
    name: "layer_norm",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("W", "weight", &["P"]),
        Argument::of("B", "bias", &["Q"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "D"])],
    constants: CONSTANTS,
    fragments: FRAGMENTS,
    file: metal!("norm/layer_norm.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "layer_norm_backward",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("W", "weight", &["P"]),
        Argument::of("T", "dy", &["N", "D"]),
        Argument::of("T", "dsum", &["N", "D"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["N", "D"]),
        Argument::fixed(Dtype::Float32, "dweight", &["R", "P"]),
        Argument::fixed(Dtype::Float32, "dbias", &["R", "Q"]),
    ],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "WEIGHTED", "BIASED", "ADDED"],
    fragments: FRAGMENTS,
    file: metal!("norm/layer_norm_backward.metal"),
};

/// Threadgroup memory of the forward kernels: a float for each simdgroup that a group may have, for each of two sums.
pub(in crate::norm) const FORWARD_BYTES: u32 = 128;

/// And of the backward kernel: for each of four sums.
const BACKWARD_BYTES: u32 = 256;

/// What a normalized row goes through: which parameters there are, and `eps`.
#[derive(Debug, Clone, Copy)]
pub(in crate::norm) struct Affine {
    pub(in crate::norm) eps: f32,
    pub(in crate::norm) weighted: bool,
    pub(in crate::norm) biased: bool,
}

impl Affine {
    pub(in crate::norm) fn of(weight: Option<&Array>, bias: Option<&Array>, eps: f32) -> Self {
        Self { eps, weighted: weight.is_some(), biased: bias.is_some() }
    }

    /// The parameters that are there, of arrays that stand in for those that are not.
    pub(in crate::norm) fn present<'a>(
        self,
        weight: &'a Array,
        bias: &'a Array,
    ) -> (Option<&'a Array>, Option<&'a Array>) {
        (self.weighted.then_some(weight), self.biased.then_some(bias))
    }

    /// The constants of a kernel: those of its rows, these, and `flags`.
    pub(in crate::norm) fn constants<const N: usize>(
        self,
        rows: &Rows,
        flags: [bool; N],
    ) -> Vec<Constant> {
        let own = [self.weighted, self.biased].into_iter().chain(flags).map(Constant::Bool);
        let eps = [Constant::Float(self.eps)];
        rows.constants().into_iter().chain(eps).chain(own).collect()
    }
}

pub(super) fn layer_norm(problem: &Problem) -> Result<Array> {
    let affine = Affine::of(problem.weight, problem.bias, problem.eps);
    let [weight, bias] = [problem.weight, problem.bias]
        .map(|array| array.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1)));
    let [y] = differentiable(
        [problem.x, &weight, &bias],
        move |inputs| Ok([forward(inputs, affine)?]),
        move |vjp| {
            let ([x, weight, bias], [dy]) = (vjp.inputs, vjp.cotangents);
            gradient(Gradient { x, weight, bias, dy, dsum: None, affine })
        },
        move |[x, weight, bias]| {
            let (weight, bias) = affine.present(weight, bias);
            Ok([reference::layer_norm(x, weight, bias, affine.eps)?])
        },
    )?;
    Ok(y)
}

fn forward([x, weight, bias]: &[Array; 3], affine: Affine) -> Result<Array> {
    let matrix = x.reshape(&[-1, x.dim(-1)])?;
    let rows = Rows::packed(matrix.dim(0), matrix.dim(1), matrix.dtype()).holding(4);
    let constants = affine.constants(&rows, []);
    let plan = Plan { constants, extents: Vec::new(), launch: rows.launch(FORWARD_BYTES) };
    let [y] = FORWARD.call(&[&matrix, weight, bias], plan)?;
    Ok(y.reshape(x.shape())?)
}

/// What the gradient of this norm is computed from.
pub(in crate::norm) struct Gradient<'a> {
    /// What was normalized.
    pub(in crate::norm) x: &'a Array,
    pub(in crate::norm) weight: &'a Array,
    pub(in crate::norm) bias: &'a Array,
    /// The gradient of the result.
    pub(in crate::norm) dy: &'a Array,
    /// The gradient of `x` by other ways, where there are any.
    pub(in crate::norm) dsum: Option<&'a Array>,
    pub(in crate::norm) affine: Affine,
}

/// The gradients of `x`, `weight` and `bias`.
pub(in crate::norm) fn gradient(of: Gradient) -> Result<[Array; 3]> {
    let dims = of.x.dim(-1);
    let matrix = of.x.reshape(&[-1, dims])?;
    let dy = of.dy.reshape(&[-1, dims])?;
    let dsum = of.dsum.map(|dsum| dsum.reshape(&[-1, dims])).transpose()?;
    let rows = Rows::packed(matrix.dim(0), dims, matrix.dtype());
    let inputs = [&matrix, of.weight, &dy, dsum.as_ref().unwrap_or(&dy)];
    let [dx, dweight, dbias] = BACKWARD.call(&inputs, plan_backward(&rows, &of))?;
    let summed = |partial: Array, like: &Array| -> Result<Array> {
        Ok(partial.sum_axis(0, false)?.reshape(like.shape())?.as_dtype(like.dtype())?)
    };
    Ok([dx.reshape(of.x.shape())?, summed(dweight, of.weight)?, summed(dbias, of.bias)?])
}

fn plan_backward(rows: &Rows, of: &Gradient) -> Plan {
    let workers = rows.workers(1);
    let biases = if of.affine.biased { of.bias.dim(0) } else { 1 };
    Plan {
        constants: of.affine.constants(rows, [of.dsum.is_some()]),
        extents: vec![("R", rows.at_once(workers)), ("Q", biases)],
        launch: rows.launch_of(workers, BACKWARD_BYTES),
    }
}
