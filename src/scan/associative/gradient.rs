//! The gradient of an affine scan: an affine scan the other way.

use mlx_rs::{Array, Dtype, ops::zeros_like};

use super::{Inputs, Mode, reference};
use crate::{
    error::Result,
    kernel::{Vjp, differentiable},
};

/// An affine scan of real numbers in plain ops. MLX would take its gradient step by step, with all that each step kept.
pub(super) fn affine_scan(mode: Mode, inputs: &Inputs) -> Result<[Array; 2]> {
    differentiable(
        inputs.each_ref(),
        move |inputs| reference::scan(mode, inputs),
        move |vjp| backward(mode, vjp),
        move |inputs| reference::scan(mode, inputs),
    )
}

/// With `c` the gradient of the state after a step that comes from later ones: that of the step is `dy + c`, which times
/// the decay is `c` for the step before. Exclusive results are the states before steps: then it is `c`, and the next one
/// `decay · c + dy`.
fn backward(mode: Mode, vjp: Vjp<'_, 4, 2>) -> Result<Inputs> {
    let ([decay, _, state, bounds], [y, _]) = (vjp.inputs, vjp.outputs);
    let [dy, dlast] = vjp.cotangents;
    let dtype = dy.dtype();
    let [wide, dy, y] = [decay, dy, y].map(|array| array.as_dtype(Dtype::Float32));
    let (wide, dy, y) = (wide?, dy?, y?);
    let added = if mode.exclusive { dy.clone() } else { wide.multiply(&dy)? };
    let back = Mode { exclusive: true, reverse: !mode.reverse, ..mode };
    let inputs = [decay.clone(), added, dlast.clone(), bounds.clone()];
    let [later, dstate] = reference::scan(back, &inputs)?;
    let (dx, before) = match mode.exclusive {
        true => (later, y),
        false => (dy.add(later)?, reference::states_before(mode, &y, state, bounds)?),
    };
    let ddecay = shared(&dx.multiply(before)?, decay)?;
    Ok([ddecay, dx.as_dtype(dtype)?, dstate, zeros_like(bounds)?])
}

/// The gradient of a decay that several elements share, of its shape and dtype.
pub(super) fn shared(of_each: &Array, decay: &Array) -> Result<Array> {
    let axes = (0..3).filter(|&axis| decay.dim(axis) != of_each.dim(axis)).collect::<Vec<_>>();
    let sum = if axes.is_empty() { of_each.clone() } else { of_each.sum_axes(&axes, true)? };
    Ok(sum.as_dtype(decay.dtype())?)
}
