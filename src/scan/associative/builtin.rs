//! MLX's own cumulative operations.

use mlx_rs::{
    Array,
    ops::{
        LogCumsumExpOptions,
        indexing::{Ellipsis, TryIndexOp},
    },
};

use super::{Inputs, Mode, ScanOperator, reference, rule::Rule};
use crate::{error::Result, kernel::differentiable_by_reference};

pub(super) fn scan(mode: Mode, inputs: &Inputs) -> Result<[Array; 2]> {
    if mode.rule == Rule::Operator(ScanOperator::Add) {
        return forward(mode, inputs);
    }
    // MLX has no gradient of products, maxima and minima.
    differentiable_by_reference(
        inputs.each_ref(),
        move |inputs| forward(mode, inputs),
        move |inputs| reference::scan(mode, inputs),
    )
}

fn forward(mode: Mode, [_, x, state, _]: &Inputs) -> Result<[Array; 2]> {
    let wide = x.as_dtype(state.dtype())?;
    let scanned = cumulative(mode, &wide)?;
    let y = match mode.stateful {
        true => mode.rule.step(state, state, &scanned)?,
        false => scanned,
    };
    let end = if mode.reverse { 0..1 } else { x.dim(1) - 1..x.dim(1) };
    let mut last = y.try_index((Ellipsis, end.clone(), ..))?;
    if mode.exclusive {
        let x = wide.try_index((Ellipsis, end, ..))?;
        last = mode.rule.step(&last, &x, &x)?;
    }
    Ok([y.as_dtype(x.dtype())?, last])
}

fn cumulative(mode: Mode, x: &Array) -> Result<Array> {
    let (axis, reverse, inclusive) = (1, mode.reverse, !mode.exclusive);
    Ok(match mode.rule {
        Rule::Operator(ScanOperator::Mul) => x.cumprod(axis, reverse, inclusive)?,
        Rule::Operator(ScanOperator::Max) => x.cummax(axis, reverse, inclusive)?,
        Rule::Operator(ScanOperator::Min) => x.cummin(axis, reverse, inclusive)?,
        Rule::Operator(ScanOperator::LogAddExp) => {
            x.logcumsumexp(LogCumsumExpOptions { axis: Some(axis), reverse, inclusive })?
        }
        Rule::Operator(ScanOperator::Add) | Rule::Affine => x.cumsum(axis, reverse, inclusive)?,
    })
}
