//! One pass by a kernel of this crate; the way back is MLX's, which no kernel was measured to beat.

use std::slice::from_ref;

use mlx_rs::{Array, Dtype, error::Exception, fast, transforms::fallible_vjp};

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    ffi::exactly,
    kernel::{Argument, Constant, File, Kernel, Plan, Rows, differentiable, metal, stand_in},
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD];

/// What every kernel of this norm is made of.
pub(in crate::norm) const FRAGMENTS: &[File] = &[
    metal!("common/chunk.metal"),
    metal!("common/row.metal"),
    metal!("common/held.metal"),
    metal!("common/rms.metal"),
];

static FORWARD: Kernel = Kernel {
    name: "rms_norm",
    inputs: &[Argument::of("T", "x", &["N", "D"]), Argument::of("W", "weight", &["P"])],
    outputs: &[Argument::of("T", "y", &["N", "D"])],
    constants: &["SIMDS", "LANES", "CHUNKS", "EPS", "UNIT_OFFSET", "WEIGHTED"],
    fragments: FRAGMENTS,
    file: metal!("norm/rms_norm.metal"),
};

/// Threadgroup memory of the forward kernels: a float for each simdgroup that a group may have.
pub(in crate::norm) const FORWARD_BYTES: u32 = 64;

pub(super) fn rms_norm(problem: &Problem) -> Result<Array> {
    let (scaling, weighted) = (problem.scaling, problem.weight.is_some());
    let weight = problem.weight.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1));
    let [y] = differentiable(
        [problem.x, &weight],
        move |[x, weight]| Ok([forward(x, weight, weighted, scaling)?]),
        move |vjp| {
            let ([x, weight], [dy]) = (vjp.inputs, vjp.cotangents);
            gradient([x, weight], weighted, dy, scaling)
        },
        move |[x, weight]| Ok([reference::rms_norm(x, weighted.then_some(weight), scaling)?]),
    )?;
    Ok(y)
}

fn forward(x: &Array, weight: &Array, weighted: bool, scaling: Scaling) -> Result<Array> {
    let matrix = x.reshape(&[-1, x.dim(-1)])?;
    let rows = Rows::packed(matrix.dim(0), matrix.dim(1), matrix.dtype()).holding(8);
    let constants = scaling.constants(&rows, [weighted]);
    let plan = Plan { constants, extents: Vec::new(), launch: rows.launch(FORWARD_BYTES) };
    let [y] = FORWARD.call(&[&matrix, weight], plan)?;
    Ok(y.reshape(x.shape())?)
}

impl Scaling {
    /// The constants of a kernel: those of its rows, of the scaling, and `flags`.
    pub(in crate::norm) fn constants<const N: usize>(
        self,
        rows: &Rows,
        flags: [bool; N],
    ) -> Vec<Constant> {
        let own = [Constant::Float(self.eps), Constant::Bool(self.unit_offset)];
        let flags = flags.map(Constant::Bool);
        rows.constants().into_iter().chain(own).chain(flags).collect()
    }
}

/// The gradients of `x` and `weight`, by MLX's op, where `dy` is that of the result.
pub(in crate::norm) fn gradient(
    inputs: [&Array; 2],
    weighted: bool,
    dy: &Array,
    scaling: Scaling,
) -> Result<[Array; 2]> {
    let normalize = move |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        let factor = weighted.then(|| scaling.factor(&inputs[1])).transpose()?;
        let y = fast::rms_norm(&inputs[0], factor.as_ref(), scaling.eps)?;
        Ok(vec![y.as_dtype(inputs[0].dtype())?])
    };
    let (_, gradients) = fallible_vjp(normalize, &inputs.map(Array::clone), from_ref(dy))?;
    Ok(exactly(gradients)?)
}
