//! The parameters of a group's rows, as arrays that are made once.

use mlx_rs::{Array, Dtype};

use super::group::keys;
use crate::{
    error::Result,
    sampling::{
        Dry, Mirostat, SamplingParams, Step,
        bits::Stream,
        rows::{rate, reach, spare},
        steps::{Bias, DryRows, Penalties},
        weights::fraction,
    },
    uploads,
};

/// `[N, 1]` each where nothing else is said; of a row without the step, such that it does nothing.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) penalties: Option<Penalties>,
    pub(super) dry: Option<DryRows>,
    pub(super) rates: Array,
    pub(super) sigmas: Array,
    pub(super) top_k: Array,
    pub(super) spare: Array,
    pub(super) reach: Array,
    pub(super) typical: Array,
    pub(super) xtc: XtcRows,
    pub(super) mirostat: MirostatRows,
}

#[derive(Debug, Clone)]
pub(super) struct XtcRows {
    /// `[N]`.
    pub(super) keys: Array,
    /// In units of 2^-64, u64.
    pub(super) probability: Array,
    pub(super) threshold: Array,
    /// `[N, V]`, bool.
    pub(super) protected: Option<Array>,
}

/// `[N]` each.
#[derive(Debug, Clone)]
pub(super) struct MirostatRows {
    pub(super) tau: Array,
    pub(super) eta: Array,
}

impl Settings {
    pub(super) fn of(params: &[SamplingParams], steps: &[Step], vocabulary: i32) -> Result<Self> {
        let columns = Columns(params);
        Ok(Self {
            penalties: steps.contains(&Step::Penalties).then(|| columns.penalties()),
            dry: steps.contains(&Step::Dry).then(|| columns.dry()),
            rates: columns.floats(Step::Temperature, 1.0, |row| rate(row.temperature)),
            sigmas: columns.floats(Step::TopNSigma, f32::INFINITY, |row| {
                row.top_n_sigma.unwrap_or(f32::INFINITY)
            }),
            top_k: columns.integers(Step::TopK, i32::MAX, |row| row.top_k),
            spare: columns.fractions(Step::TopP, |row| spare(row.top_p)),
            reach: columns.floats(Step::MinP, f32::INFINITY, |row| reach(row.min_p)),
            typical: columns.fractions(Step::TypicalP, |row| spare(row.typical_p)),
            xtc: columns.xtc(vocabulary)?,
            mirostat: columns.mirostat()?,
        })
    }
}

/// DRY of one request.
pub(in crate::sampling) fn dry_of(params: &SamplingParams) -> DryRows {
    Columns(std::slice::from_ref(params)).dry()
}

/// The rows' parameters, one a row.
struct Columns<'a>(&'a [SamplingParams]);

impl Columns<'_> {
    fn shape(&self) -> [i32; 2] {
        [self.0.len() as i32, 1]
    }

    /// `value` of rows that have `step`, `off` of the others.
    fn values<T: Copy>(&self, step: Step, off: T, value: impl Fn(&SamplingParams) -> T) -> Vec<T> {
        let of = |row: &SamplingParams| if row.active().contains(&step) { value(row) } else { off };
        self.0.iter().map(of).collect()
    }

    fn floats(&self, step: Step, off: f32, value: impl Fn(&SamplingParams) -> f32) -> Array {
        Array::from_slice(&self.values(step, off, value), &self.shape())
    }

    fn integers(&self, step: Step, off: i32, value: impl Fn(&SamplingParams) -> i32) -> Array {
        Array::from_slice(&self.values(step, off, value), &self.shape())
    }

    fn fractions(&self, step: Step, value: impl Fn(&SamplingParams) -> u64) -> Array {
        Array::from_slice(&self.values(step, 0, value), &self.shape())
    }

    fn penalties(&self) -> Penalties {
        let step = Step::Penalties;
        Penalties {
            repetition: self.floats(step, 1.0, |row| row.repetition_penalty),
            frequency: self.floats(step, 0.0, |row| row.frequency_penalty),
            presence: self.floats(step, 0.0, |row| row.presence_penalty),
        }
    }

    fn dry(&self) -> DryRows {
        let dry = |row: &SamplingParams| row.dry.clone().unwrap_or_default();
        let breakers: Vec<_> = self.0.iter().map(|row| dry(row).breakers).collect();
        let most = breakers.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let padded = breakers.iter().flat_map(|row| {
            let ids = row.iter().map(|&id| id.cast_signed());
            ids.chain(std::iter::repeat(-1)).take(most)
        });
        let padded: Vec<_> = padded.collect();
        DryRows {
            multiplier: self.floats(Step::Dry, 0.0, |row| dry(row).multiplier),
            base: self.floats(Step::Dry, 1.0, |row| dry(row).base),
            allowed: self.integers(Step::Dry, i32::MAX, |row| of_dry(&dry(row))),
            breakers: Array::from_slice(&padded, &[self.0.len() as i32, 1, most as i32]),
        }
    }

    fn xtc(&self, vocabulary: i32) -> Result<XtcRows> {
        let xtc = |row: &SamplingParams| row.xtc.clone().unwrap_or_default();
        let guarded = |row: &SamplingParams| !xtc(row).protected.is_empty();
        let protected = match self.0.iter().any(guarded) {
            true => Some(marked(self.0.iter().map(|row| xtc(row).protected), vocabulary)?),
            false => None,
        };
        Ok(XtcRows {
            keys: keys(self.0, Stream::Coin),
            probability: self.fractions(Step::Xtc, |row| fraction(xtc(row).probability.into())),
            threshold: self.floats(Step::Xtc, 1.0, |row| xtc(row).threshold),
            protected,
        })
    }

    fn mirostat(&self) -> Result<MirostatRows> {
        let mirostat =
            |row: &SamplingParams| row.mirostat.unwrap_or(Mirostat { tau: 0.0, eta: 0.0 });
        let of = |value: fn(Mirostat) -> f32| {
            let column = self.floats(Step::Mirostat, 0.0, |row| value(mirostat(row)));
            column.reshape(&[-1])
        };
        Ok(MirostatRows { tau: of(|row| row.tau)?, eta: of(|row| row.eta)? })
    }
}

fn of_dry(dry: &Dry) -> i32 {
    i32::try_from(dry.allowed_length).unwrap_or(i32::MAX)
}

/// Which tokens each row names, `[N, V]`.
fn marked(rows: impl Iterator<Item = Vec<u32>>, vocabulary: i32) -> Result<Array> {
    let mut bias = Bias::default();
    for tokens in rows {
        let named = tokens.into_iter().map(|token| (token, 1.0)).collect();
        let params = SamplingParams { logit_bias: named, ..Default::default() };
        bias.row(&params, 0, vocabulary);
    }
    Ok(bias.array(vocabulary)?.gt(uploads::float(0.0))?.as_dtype(Dtype::Bool)?)
}
