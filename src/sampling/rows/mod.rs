//! The usual end of a chain, for all rows at once: temperature, top-k, top-p, min-p, draw.

mod kernel;
mod reference;
mod verify;

pub(crate) use kernel::KERNELS;
pub(super) use reference::filtered;
pub(super) use verify::{probabilities, verify};

use mlx_rs::Array;

use super::{Step, params::SamplingParams, weights::fraction};
use crate::{
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    kernel::refusal,
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
    /// The reciprocals of temperatures, f32; 0 takes the best.
    pub(super) rates: Array,
    /// i32; the largest number for all.
    pub(super) top_k: Array,
    /// What share may be dropped, in units of 2^-64, u64.
    pub(super) spares: Array,
    /// How far below the best, f32; ∞ for all.
    pub(super) reaches: Array,
    pub(super) wants: Wants,
}

/// Whether any row draws or takes the best, and which steps any row has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wants {
    pub(super) draw: bool,
    pub(super) greedy: bool,
    /// The largest `top_k`, where all rows that draw have one.
    pub(super) most_seats: Option<i32>,
    pub(super) top_k: bool,
    pub(super) top_p: bool,
    pub(super) min_p: bool,
}

/// What may be dropped where `p` is to be kept, in units of 2^-64.
pub(super) fn spare(p: f32) -> u64 {
    fraction(1.0 - f64::from(p))
}

/// What a temperature above 0 multiplies by.
pub(super) fn rate(temperature: f32) -> f32 {
    temperature.recip().min(f32::MAX)
}

/// How far below the best a token may be that is at least `p` times as likely.
pub(super) fn reach(p: f32) -> f32 {
    p.ln().abs()
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
        let rates = floats(&|params| match params.temperature {
            _ if params.is_greedy() => 0.0,
            temperature if has(params, Step::Temperature) => rate(temperature),
            _ => 1.0,
        });
        let reaches = floats(&|params| {
            if has(params, Step::MinP) { reach(params.min_p) } else { f32::INFINITY }
        });
        let top_k = requests
            .iter()
            .map(|params| if has(params, Step::TopK) { params.top_k } else { i32::MAX });
        let spares = requests
            .iter()
            .map(|params| if has(params, Step::TopP) { spare(params.top_p) } else { 0 });
        let bounded = requests.iter().all(|params| has(params, Step::TopK) || params.is_greedy());
        let any = |step| requests.iter().any(|params| has(params, step));
        Self {
            keys,
            rates,
            top_k: Array::from_slice(&top_k.collect::<Vec<_>>(), &[count]),
            spares: Array::from_slice(&spares.collect::<Vec<_>>(), &[count]),
            reaches,
            wants: Wants {
                draw: requests.iter().any(|params| !params.is_greedy()),
                greedy: requests.iter().any(|params| params.is_greedy()),
                most_seats: match bounded {
                    true => requests.iter().map(|params| params.top_k).max(),
                    false => None,
                },
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
    /// Of the logits as they came; anything where that is not wanted.
    pub(super) before: Array,
}

/// Draws a token for each row of `logits`, `[N, V]`.
pub(super) fn sample(problem: &Problem, dispatch: Dispatch) -> Result<Drawn> {
    match dispatch.resolve(problem)? {
        Backend::Kernel => kernel::sample(problem),
        Backend::Builtin | Backend::Reference => reference::sample(problem),
    }
}

/// A checked call.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) logits: &'a Array,
    pub(super) positions: &'a Array,
    pub(super) filters: &'a Filters,
    /// Whether log-probabilities before the steps are wanted.
    pub(super) before: bool,
    /// Whether tokens are proposed, for [`verify`].
    pub(super) proposed: bool,
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "SamplerBatch";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.logits.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel if self.proposed => Some("no kernel checks proposed tokens"),
            Backend::Kernel => context.obstacle.or_else(|| refusal([self.logits])),
            Backend::Builtin => Some("MLX has no such op"),
            Backend::Reference => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::{Dtype, ops::zeros_dtype};

    use super::*;
    use crate::{config::Settings, target::Target};

    #[test]
    fn auto_takes_the_kernel_for_rows_of_common_vocabularies_where_it_was_measured() -> Result<()> {
        let keys = zeros_dtype(&[1], Dtype::Uint64)?;
        let filters = Filters::of(&[&SamplingParams::default()], &STEPS, keys);
        let chosen = |target, vocabulary, proposed| -> Result<Backend> {
            let (logits, positions) =
                (zeros_dtype(&[1, vocabulary], Dtype::Float32)?, Array::from_slice(&[0], &[1]));
            let (before, context) =
                (false, Context { target, obstacle: None, settings: Settings::default() });
            let (logits, positions, filters) = (&logits, &positions, &filters);
            Ok(Problem { logits, positions, filters, before, proposed }.choose(&context))
        };
        for vocabulary in [32_000, 49_152, 128_256] {
            assert_eq!(chosen(Target::Cuda, vocabulary, false)?, Backend::Kernel, "{vocabulary}");
            assert_eq!(chosen(Target::Cuda, vocabulary, true)?, Backend::Reference, "proposed");
            assert_eq!(chosen(Target::Metal, vocabulary, false)?, Backend::Reference, "unseen");
        }
        assert_eq!(chosen(Target::Cuda, 100, false)?, Backend::Reference);
        Ok(())
    }
}
