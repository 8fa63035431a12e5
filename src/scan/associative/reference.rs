//! The definition, in plain MLX ops.

use mlx_rs::{
    Array,
    ops::{broadcast_to, ones_like},
};

use super::{
    Inputs, Mode,
    chunked::{Scanner, all, cut, joined, part},
    rule::{Rule, wide},
    segments::{self, Places},
};
use crate::error::Result;

pub(super) fn scan(mode: Mode, [decay, x, state, bounds]: &Inputs) -> Result<[Array; 2]> {
    let (dtype, length) = (x.dtype(), x.dim(1));
    let (x, state) = (time_first(x)?, time_first(state)?);
    let decay = match mode.rule {
        Rule::Affine => {
            let decay = time_first(decay)?;
            broadcast_to(&decay, &[&[length], &decay.shape()[1..]].concat())?
        }
        Rule::Operator(_) => x.clone(),
    };
    let steps = Steps { mode, decay, x };
    let places = places(mode, bounds, length)?;
    let [scanned, last] = match &places {
        Some(places) => steps.in_segments(&state, places)?,
        None => steps.whole(&state)?,
    };
    let y = match mode.exclusive {
        true => shifted(mode, &scanned, &state, places.as_ref())?,
        false => scanned,
    };
    Ok([y.swap_axes(0, 1)?.as_dtype(dtype)?, last.swap_axes(0, 1)?])
}

/// The states before steps, wide, given `y`, those after them, and `state`, those before segments; all as in [`Inputs`].
pub(super) fn states_before(mode: Mode, y: &Array, state: &Array, bounds: &Array) -> Result<Array> {
    let (scanned, places) = (time_first(y)?, places(mode, bounds, y.dim(1))?);
    Ok(shifted(mode, &scanned, &time_first(state)?, places.as_ref())?.swap_axes(0, 1)?)
}

fn places(mode: Mode, bounds: &Array, length: i32) -> Result<Option<Places>> {
    mode.segmented.then(|| Places::new(bounds, length, mode.reverse)).transpose()
}

/// The same with time first.
fn shifted(mode: Mode, scanned: &Array, state: &Array, places: Option<&Places>) -> Result<Array> {
    let length = scanned.dim(0);
    let (before_last, _) = cut(mode.reverse, 0..length, length - 1);
    let others = part(scanned, before_last)?;
    let Some(places) = places else { return joined(mode.reverse, state, &others) };
    let begun = places.states(state)?;
    places.at_starts(&begun, &joined(mode.reverse, &part(&begun, 0..1)?, &others)?)
}

/// `[L, O, I]` of `[O, L, I]`, wide.
fn time_first(array: &Array) -> Result<Array> {
    Ok(array.as_dtype(wide(array.dtype()))?.swap_axes(0, 1)?)
}

/// `[L, O, I]` both, or what broadcasts to it.
struct Steps {
    mode: Mode,
    decay: Array,
    x: Array,
}

impl Steps {
    /// `state` is `[1, O, I]`.
    fn whole(self, state: &Array) -> Result<[Array; 2]> {
        let rule = self.mode.rule;
        let scanner = Scanner {
            combine: &|first, second| rule.combine(first, second),
            reverse: self.mode.reverse,
        };
        let length = self.x.dim(0);
        let start = self.elements(ones_like(part(&self.decay, 0..1)?)?, state.clone());
        let elements = self.elements(self.decay.clone(), self.x.clone());
        let scanned = scanner.scan(&elements, &start)?.pop().unwrap_or(self.x);
        let (_, last) = cut(self.mode.reverse, 0..length, length - 1);
        let last = part(&scanned, last)?;
        Ok([scanned, last])
    }

    /// `states` is `[N, O, I]`.
    fn in_segments(self, states: &Array, places: &Places) -> Result<[Array; 2]> {
        let rule = self.mode.rule;
        let scanner = Scanner {
            combine: &|first, second| {
                segments::combine(first, second, &|first, second| rule.combine(first, second))
            },
            reverse: self.mode.reverse,
        };
        let begun = places.states(states)?;
        let x = places.at_starts(&rule.step(&begun, &self.decay, &self.x)?, &self.x)?;
        let mut elements = self.elements(self.decay.clone(), x);
        elements.push(places.starts.clone());
        // What comes before the first element matters to none, as each segment begins anew.
        let mut scanned = scanner.scan(&elements, &all(&elements, 0..1)?)?;
        scanned.pop();
        let scanned = scanned.pop().unwrap_or(self.x);
        let last = places.last(&scanned, states)?;
        Ok([scanned, last])
    }

    /// What the rule combines: steps, and before them decays if there are any.
    fn elements(&self, decay: Array, x: Array) -> Vec<Array> {
        match self.mode.rule {
            Rule::Affine => vec![decay, x],
            Rule::Operator(_) => vec![x],
        }
    }
}
