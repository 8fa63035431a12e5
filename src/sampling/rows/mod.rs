//! The usual end of a chain, for all rows at once: temperature, top-k, top-p, min-p, draw.

mod reference;

pub(super) use reference::filtered;

use mlx_rs::Array;

use super::{Step, params::SamplingParams, weights::fraction};
use crate::{
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
};

/// The steps that are done here, in order.
pub(super) const STEPS: [Step; 4] = [Step::Temperature, Step::TopK, Step::TopP, Step::MinP];

/// Whether `steps` are some of [`STEPS`], in order.
pub(super) fn takes(steps: &[Step]) -> bool {
    let mut left = STEPS.iter();
    steps.iter().all(|step| left.any(|other| other == step))
}

/// The parameters of all rows, `[N]` each.
#[derive(Debug, Clone)]
pub(super) struct Filters {
    /// u64.
    pub(super) keys: Array,
    /// f32; 0 takes the best.
    pub(super) temperature: Array,
    /// i32; the largest number for all.
    pub(super) top_k: Array,
    /// What share may be dropped, in units of 2^-64, u64.
    pub(super) spare: Array,
    /// How far below the best, f32; −∞ for all.
    pub(super) floor: Array,
    /// Whether any row draws, and which steps any row has.
    pub(super) wants: Wants,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wants {
    pub(super) draw: bool,
    pub(super) top_k: bool,
    pub(super) top_p: bool,
    pub(super) min_p: bool,
}

/// `spare` of a probability.
pub(super) fn spare(p: f32) -> u64 {
    fraction(1.0 - f64::from(p))
}

impl Filters {
    /// Those of `requests` that are among `steps`; the others are done already.
    pub(super) fn of(requests: &[&SamplingParams], steps: &[Step], keys: Array) -> Self {
        let has = |params: &SamplingParams, step| {
            steps.contains(&step) && params.sets(step) && !params.is_greedy()
        };
        let count = requests.len() as i32;
        let floats = |value: &dyn Fn(&SamplingParams) -> f32| {
            let values: Vec<_> = requests.iter().map(|params| value(params)).collect();
            Array::from_slice(&values, &[count])
        };
        let temperature = floats(&|params| match params.temperature {
            temperature if has(params, Step::Temperature) => temperature,
            _ if params.is_greedy() => 0.0,
            _ => 1.0,
        });
        let floor = floats(&|params| {
            if has(params, Step::MinP) { params.min_p.ln() } else { f32::NEG_INFINITY }
        });
        let top_k = requests
            .iter()
            .map(|params| if has(params, Step::TopK) { params.top_k } else { i32::MAX });
        let spare = requests
            .iter()
            .map(|params| if has(params, Step::TopP) { spare(params.top_p) } else { 0 });
        let any = |step| requests.iter().any(|params| has(params, step));
        Self {
            keys,
            temperature,
            top_k: Array::from_slice(&top_k.collect::<Vec<_>>(), &[count]),
            spare: Array::from_slice(&spare.collect::<Vec<_>>(), &[count]),
            floor,
            wants: Wants {
                draw: requests.iter().any(|params| !params.is_greedy()),
                top_k: any(Step::TopK),
                top_p: any(Step::TopP),
                min_p: any(Step::MinP),
            },
        }
    }
}

/// What was drawn, `[N]` each: tokens u32, and their log-probabilities.
pub(super) struct Drawn {
    pub(super) tokens: Array,
    /// After the steps.
    pub(super) after: Array,
    /// Of the logits as they came.
    pub(super) before: Array,
}

/// Draws a token for each row of `logits`, `[N, V]`.
pub(super) fn sample(
    logits: &Array,
    positions: &Array,
    filters: &Filters,
    dispatch: Dispatch,
) -> Result<Drawn> {
    let problem = Problem { logits, positions, filters };
    match dispatch.resolve(&problem)? {
        Backend::Builtin | Backend::Kernel | Backend::Reference => reference::sample(&problem),
    }
}

/// A checked call.
struct Problem<'a> {
    logits: &'a Array,
    positions: &'a Array,
    filters: &'a Filters,
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "SamplerBatch";

    fn choose(&self, _: &Context) -> Backend {
        Backend::Reference
    }

    fn refusal(&self, backend: Backend, _: &Context) -> Option<&'static str> {
        match backend {
            Backend::Reference => None,
            _ => Some("not yet"),
        }
    }
}
