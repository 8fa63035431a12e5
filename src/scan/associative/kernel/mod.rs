//! One pass over memory by kernels of this crate, forward and back; two where there are few rows.

mod geometry;
mod texts;

pub(crate) use texts::KERNELS;

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, concatenate, indexing::TryIndexOp, sort, zeros_like},
};

use self::{
    geometry::Geometry,
    texts::{Direction, Texts},
};
use super::{Inputs, Mode, ScanOperator, gradient, reference, rule::Rule};
use crate::{
    error::Result,
    kernel::{self, Vjp, differentiable, differentiable_by_reference},
    sizes::div_ceil,
    target::Target,
    uploads,
};

pub(super) fn refusal([decay, x, state, _]: &Inputs, target: Target) -> Option<&'static str> {
    if [decay, x].iter().any(|array| array.dtype() == Dtype::Complex64) {
        return Some("the kernel takes no complex numbers");
    }
    kernel::refusal([x, state]).or_else(|| {
        let launches = Geometry::of(x).plan(state.dim(1)).1.check("scan", target).is_ok();
        (!launches).then_some("the kernel takes fewer rows and segments")
    })
}

pub(super) fn scan(mode: Mode, inputs: &Inputs) -> Result<[Array; 2]> {
    let forward = move |inputs: &Inputs| forward(mode, inputs);
    let reference = move |inputs: &Inputs| reference::scan(mode, inputs);
    match mode.rule {
        Rule::Affine => {
            let backward = move |vjp: Vjp<'_, 4, 2>| affine_backward(mode, vjp);
            differentiable(inputs.each_ref(), forward, backward, reference)
        }
        Rule::Operator(ScanOperator::Add) => {
            let backward = move |vjp: Vjp<'_, 4, 2>| sum_backward(mode, vjp);
            differentiable(inputs.each_ref(), forward, backward, reference)
        }
        Rule::Operator(_) => differentiable_by_reference(inputs.each_ref(), forward, reference),
    }
}

fn forward(mode: Mode, [decay, x, state, bounds]: &Inputs) -> Result<[Array; 2]> {
    let decay = match mode.rule {
        Rule::Affine => broadcast_to(decay, x.shape())?,
        Rule::Operator(_) => x.clone(),
    };
    let texts = Texts::of(x);
    let direction = Direction { exclusive: mode.exclusive, reverse: mode.reverse };
    let Some(pieces) = Pieces::of(mode, x, bounds, &texts.geometry)? else {
        return texts.scan(mode.rule, direction, [&decay, x, state, bounds]);
    };
    let [states, last] = pieces.states(mode, direction, &texts, [&decay, x, state], false)?;
    let [y, _] = texts.scan(mode.rule, direction, [&decay, x, &states, &pieces.bounds])?;
    Ok([y, last])
}

/// The gradient of a sum is a sum the other way.
fn sum_backward(mode: Mode, vjp: Vjp<'_, 4, 2>) -> Result<Inputs> {
    let ([decay, _, _, bounds], [dy, dlast]) = (vjp.inputs, vjp.cotangents);
    let back = Mode { reverse: !mode.reverse, ..mode };
    let inputs = [decay.clone(), dy.clone(), dlast.clone(), bounds.clone()];
    let [dx, dstate] = forward(back, &inputs)?;
    Ok([zeros_like(decay)?, dx, dstate, zeros_like(bounds)?])
}

fn affine_backward(mode: Mode, vjp: Vjp<'_, 4, 2>) -> Result<Inputs> {
    let ([decay, x, state, bounds], [y, _]) = (vjp.inputs, vjp.outputs);
    let [dy, dlast] = vjp.cotangents;
    // What is summed up over axes afterwards is not rounded before.
    let wide =
        if decay.shape() != x.shape() { decay.as_dtype(Dtype::Float32)? } else { decay.clone() };
    let decays = broadcast_to(&wide, x.shape())?;
    let texts = Texts::of(x);
    let back = Direction { exclusive: mode.exclusive, reverse: !mode.reverse };
    let [dx, ddecay, dstate] = match Pieces::of(mode, x, bounds, &texts.geometry)? {
        None => texts.affine_backward(back, [&decays, y, dy, state, dlast, bounds])?,
        Some(pieces) => {
            let forth = Direction { exclusive: mode.exclusive, reverse: mode.reverse };
            let [states, _] = pieces.states(mode, forth, &texts, [&decays, x, state], false)?;
            let flowing = [&decays, dy, dlast];
            let [flows, dstate] = pieces.states(mode, back, &texts, flowing, !mode.exclusive)?;
            let inputs = [&decays, y, dy, &states, &flows, &pieces.bounds];
            let [dx, ddecay, _] = texts.affine_backward(back, inputs)?;
            [dx, ddecay, dstate]
        }
    };
    Ok([gradient::shared(&ddecay, decay)?, dx, dstate, zeros_like(bounds)?])
}

/// The axis in pieces that groups scan side by side, where rows and segments alone are too few for a GPU.
struct Pieces {
    /// `[P + 1]`: where pieces begin and end. Segments begin and end with some of them.
    bounds: Array,
    /// `[N + 1]`: which pieces those are.
    of_segments: Array,
}

impl Pieces {
    fn of(mode: Mode, x: &Array, bounds: &Array, geometry: &Geometry) -> Result<Option<Self>> {
        let (length, segments) = (x.dim(1), bounds.dim(0) - 1);
        let count = geometry.pieces(segments);
        let each = div_ceil(length, count);
        let inner = (1..count).map(|piece| piece * each).filter(|&begin| begin < length);
        let inner = inner.collect::<Vec<_>>();
        if inner.is_empty() {
            return Ok(None);
        }
        let last = inner.len() as i32 + segments;
        let inner = uploads::integers(inner);
        let all = sort(concatenate(&[bounds, &inner], 0)?)?;
        let of_segments = match mode.segmented {
            // The first piece that does not begin before the segment; of several, all but one are empty.
            true => {
                let begins = bounds.try_index(..segments)?.expand_dims(1)?;
                let earlier = all.lt(begins)?.as_dtype(Dtype::Int32)?.sum_axis(-1, false)?;
                let last = uploads::integers(vec![last]);
                concatenate(&[earlier.as_dtype(Dtype::Int32)?, last], 0)?
            }
            false => uploads::integers(vec![0, last]),
        };
        Ok(Some(Self { bounds: all, of_segments }))
    }

    /// What each piece begins with, `[O, P, I]`, and what segments end with, `[O, N, I]`, where they begin with `state`.
    fn states(
        &self,
        mode: Mode,
        direction: Direction,
        texts: &Texts,
        [decay, x, state]: [&Array; 3],
        scaled: bool,
    ) -> Result<[Array; 2]> {
        let reverse = direction.reverse;
        let [decays, values] =
            texts.totals(mode.rule, reverse, scaled, [decay, x, &self.bounds])?;
        let over_pieces = Direction { exclusive: true, reverse };
        let inputs = [&decays, &values, state, &self.of_segments];
        Texts::of(&values).scan(mode.rule, over_pieces, inputs)
    }
}
