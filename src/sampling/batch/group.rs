//! Rows that go through the same steps together.

use std::collections::BTreeMap;

use mlx_rs::{Array, ops::select};

use super::{
    LogProbabilities, Proposal, Sampled, SamplerBatchOptions, TopLogProbabilities,
    masked::Masked,
    report,
    rows::{self, Filters, Problem},
};
use crate::{
    error::Result,
    sampling::{
        SamplingParams, Step, TokenHistory,
        batch::settings::Settings,
        bits::{Stream, bits, key},
        filter::scores,
        history::{Counts, Recent, stack_all},
        log_probability::{log_probabilities, token_log_probabilities},
        steps::{
            Bias, dry, min_p, mirostat, penalize, surprise_of, temper_some, top_k, top_n_sigma,
            top_p, typical_p, without_top_choices,
        },
    },
};

/// What the rows of a group have in common: the order of their steps, and how far back DRY looks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    chain: Vec<Step>,
    range: u32,
}

impl Kind {
    fn of(params: &SamplingParams) -> Self {
        let active = params.active();
        let range = params.dry.as_ref().filter(|_| active.contains(&Step::Dry));
        let chain = if rows::takes(&active) { rows::STEPS.to_vec() } else { params.chain.clone() };
        Self { chain, range: range.map_or(0, |dry| dry.range) }
    }
}

/// Rows of one kind.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// Which rows of the batch.
    pub(super) rows: Vec<i32>,
    /// The same, where the group is not the whole batch.
    index: Option<Array>,
    params: Vec<SamplingParams>,
    vocabulary: i32,
    /// The steps that any row has and that go one by one.
    steps: Vec<Step>,
    /// None where no step needs any.
    settings: Option<Settings>,
    /// The steps that end the chain.
    filters: Filters,
    pub(super) state: State,
}

/// What changes from token to token.
#[derive(Debug, Clone)]
pub(super) struct State {
    generated: Vec<u32>,
    counts: Option<Counts>,
    recent: Option<Recent>,
    bound: Option<Array>,
    /// `[N, V]`: it changes where a row has its minimum of tokens.
    bias: Option<Array>,
}

/// What was drawn for the rows of a group.
pub(super) struct GroupDraw {
    pub(super) tokens: Array,
    pub(super) log_probabilities: Array,
    pub(super) top: Option<TopLogProbabilities>,
    pub(super) surprise: Option<Array>,
}

impl Group {
    /// The requests of a batch, by kind.
    pub(super) fn of_requests(
        requests: Vec<(SamplingParams, TokenHistory)>,
        vocabulary: i32,
    ) -> Result<Vec<Self>> {
        let count = requests.len();
        let mut kinds: BTreeMap<Kind, Vec<_>> = BTreeMap::new();
        for (row, request) in (0..).zip(requests) {
            kinds.entry(Kind::of(&request.0)).or_default().push((row, request));
        }
        let groups = kinds.into_iter().map(|(kind, rows)| {
            let whole = rows.len() == count;
            Self::new(&kind, rows, whole, vocabulary)
        });
        groups.collect()
    }

    fn new(
        kind: &Kind,
        requests: Vec<(i32, (SamplingParams, TokenHistory))>,
        whole: bool,
        vocabulary: i32,
    ) -> Result<Self> {
        let (rows, requests): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
        let (params, histories): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
        let active: Vec<_> = params.iter().map(SamplingParams::active).collect();
        let any = |step: &Step| active.iter().any(|active| active.contains(step));
        let steps: Vec<_> = kind.chain.iter().copied().filter(any).collect();
        let alone = (0..).find(|&start| steps.get(start..).is_none_or(rows::takes)).unwrap_or(0);
        let (steps, ending) = steps.split_at(alone.min(steps.len()));
        let generated: Vec<_> = histories.iter().map(|history| history.generated).collect();
        let borrowed: Vec<_> = params.iter().collect();
        let keys = keys(&params, Stream::Draw);
        let index = (!whole).then(|| Array::from_slice(&rows, &[rows.len() as i32]));
        Ok(Self {
            filters: Filters::of(&borrowed, ending, keys),
            settings: match steps {
                [] => None,
                steps => Some(Settings::of(&params, steps, vocabulary)?),
            },
            state: State {
                counts: counts(&histories, vocabulary)?,
                recent: recent(&histories, kind.range.cast_signed())?,
                bound: bound(&histories)?,
                bias: bias(&params, &generated, steps, vocabulary)?,
                generated,
            },
            steps: steps.to_vec(),
            rows,
            index,
            params,
            vocabulary,
        })
    }

    /// Draws for the group's rows of the whole batch's `logits`, without what masks forbid, and `positions`.
    pub(super) fn draw(
        &self,
        logits: &Array,
        masked: Option<&Masked>,
        positions: &Array,
        proposal: Option<Proposal>,
        options: &SamplerBatchOptions,
    ) -> Result<GroupDraw> {
        // Where no row of its own has a mask, it draws as if there were none.
        let masked = masked.filter(|masked| self.rows.iter().any(|&row| masked.is_of(row)));
        let (logits, positions) = (self.own(logits)?, self.own(positions)?);
        let open = masked.map_or_else(|| Ok(logits.clone()), |masked| self.own(&masked.logits))?;
        let (left, watched) = self.stepped(&open, &positions)?;
        let before = self.steps.is_empty();
        let (filters, proposed) = (&self.filters, proposal.is_some());
        let problem = Problem { logits: &left, positions: &positions, filters, before, proposed };
        let drawn = match proposal {
            None => rows::sample(&problem, options.dispatch)?,
            Some(Proposal { tokens, probabilities }) => {
                let (tokens, probabilities) = (self.own(tokens)?, self.own(probabilities)?);
                let proposal = Proposal { tokens: &tokens, probabilities: &probabilities };
                let coins = keys(&self.params, Stream::Verdict);
                rows::verify(&problem, &proposal, &coins, options.dispatch)?
            }
        };
        let before = || token_log_probabilities(&logits, &drawn.tokens);
        let log_probabilities = match (options.log_probabilities, masked) {
            (LogProbabilities::Processed, _) => {
                let before = if self.steps.is_empty() { drawn.before } else { before()? };
                select(before.is_nan()?, before, drawn.after)?
            }
            (LogProbabilities::Raw, _) if !self.steps.is_empty() => before()?,
            (LogProbabilities::Raw, None) => drawn.before,
            // Of the others, to the bit what they would be without masks.
            (LogProbabilities::Raw, Some(masked)) => {
                select(self.own(&masked.marks)?, before()?, drawn.before)?
            }
        };
        let surprise = watched.map(|scores| surprise_of(&scores, &drawn.tokens.expand_dims(-1)?));
        Ok(GroupDraw {
            log_probabilities,
            top: self.top(&logits, &left, options)?,
            surprise: match surprise {
                Some(surprise) => Some(surprise?.squeeze_axes(&[-1])?),
                None => None,
            },
            tokens: drawn.tokens,
        })
    }

    /// What the group's rows are drawn by, of the whole batch's `logits` and `positions`.
    pub(super) fn probabilities(&self, logits: &Array, positions: &Array) -> Result<Array> {
        let (left, _) = self.stepped(&self.own(logits)?, &self.own(positions)?)?;
        rows::probabilities(&left, &self.filters)
    }

    /// The group's rows of an array of the whole batch.
    fn own(&self, array: &Array) -> Result<Array> {
        match &self.index {
            Some(index) => Ok(array.take_axis(index, 0)?),
            None => Ok(array.clone()),
        }
    }

    /// The logits after the steps that go one by one, and as Mirostat found them.
    fn stepped(&self, logits: &Array, positions: &Array) -> Result<(Array, Option<Array>)> {
        if self.steps.is_empty() {
            return Ok((logits.clone(), None));
        }
        let (mut left, mut below, mut watched) = (scores(logits)?, None, None);
        for &step in &self.steps {
            if step == Step::Mirostat {
                watched = Some(left.clone());
            }
            left = self.step(step, &left, &mut below, positions)?;
        }
        Ok((left, watched))
    }

    /// What a step leaves of scores; `below` is what [`temper_some`] says of them, if it has been.
    fn step(
        &self,
        step: Step,
        left: &Array,
        below: &mut Option<Array>,
        positions: &Array,
    ) -> Result<Array> {
        let Some(set) = &self.settings else { return Ok(left.clone()) };
        match step {
            Step::Penalties => match (&self.state.counts, &set.penalties) {
                (Some(counts), Some(penalties)) => {
                    penalize(left, below.as_ref(), counts, penalties)
                }
                _ => Ok(left.clone()),
            },
            Step::Dry => match (&self.state.recent, &set.dry) {
                (Some(recent), Some(rows)) => dry(left, recent, rows),
                _ => Ok(left.clone()),
            },
            Step::Bias => match &self.state.bias {
                Some(bias) => Ok(left.add(bias)?),
                None => Ok(left.clone()),
            },
            Step::Temperature => {
                let (tempered, centred_by) = temper_some(left, &set.rates)?;
                *below = Some(centred_by);
                Ok(tempered)
            }
            Step::TopNSigma => top_n_sigma(left, &set.sigmas),
            Step::TopK => top_k(left, &set.top_k),
            Step::TopP => top_p(left, &set.spare),
            Step::MinP => min_p(left, &set.reach),
            Step::TypicalP => typical_p(left, &set.typical),
            Step::Xtc => {
                let coin = bits(&set.xtc.keys, positions)?.expand_dims(-1)?;
                let happens = coin.lt(&set.xtc.probability)?;
                let protected = set.xtc.protected.as_ref();
                without_top_choices(left, &happens, &set.xtc.threshold, protected)
            }
            Step::Mirostat => match &self.state.bound {
                Some(bound) => mirostat(left, &bound.expand_dims(-1)?),
                None => Ok(left.clone()),
            },
        }
    }

    fn top(
        &self,
        logits: &Array,
        left: &Array,
        options: &SamplerBatchOptions,
    ) -> Result<Option<TopLogProbabilities>> {
        if options.top == 0 {
            return Ok(None);
        }
        let all = match options.log_probabilities {
            LogProbabilities::Raw => log_probabilities(logits)?,
            LogProbabilities::Processed => {
                log_probabilities(rows::filtered(&scores(left)?, &self.filters)?)?
            }
        };
        Ok(Some(report::top(&all, options.top)?))
    }

    /// The state one token further.
    pub(super) fn advanced(&self, sampled: &Sampled) -> Result<State> {
        let mut next = self.state.clone();
        next.generated.iter_mut().for_each(|count| *count += 1);
        let Some(set) = &self.settings else { return Ok(next) };
        if let Some(counts) = &mut next.counts {
            *counts = counts.push(&self.own(&sampled.tokens)?)?;
        }
        if let (Some(recent), Some(rows)) = (&mut next.recent, &set.dry) {
            *recent = recent.push(&self.own(&sampled.tokens)?, rows)?;
        }
        if let (Some(bound), Some(surprise)) = (&mut next.bound, &sampled.surprise) {
            let off = self.own(surprise)?.subtract(&set.mirostat.tau)?;
            *bound = bound.subtract(off.multiply(&set.mirostat.eta)?)?;
        }
        let past_minimum = |(params, &count): (&SamplingParams, &u32)| count == params.min_tokens;
        if self.params.iter().zip(&next.generated).any(past_minimum) {
            next.bias = bias(&self.params, &next.generated, &self.steps, self.vocabulary)?;
        }
        Ok(next)
    }

    /// Each row's history.
    pub(super) fn into_histories(self) -> Result<Vec<(i32, TokenHistory)>> {
        let history = |(place, (&row, &generated)): (i32, (&i32, &u32))| {
            let params = &self.params[place.unsigned_abs() as usize];
            let remembers = |step| params.active().contains(&step);
            let counts = self.state.counts.as_ref().filter(|_| remembers(Step::Penalties));
            let recent = self.state.recent.as_ref().filter(|_| remembers(Step::Dry));
            let bound = self.state.bound.as_ref().filter(|_| remembers(Step::Mirostat));
            let place_alone = Array::from_slice(&[place], &[1]);
            let history = TokenHistory {
                vocabulary: self.vocabulary,
                generated,
                counts: counts.map(|counts| counts.row(place)).transpose()?,
                recent: recent.map(|recent| recent.row(place)).transpose()?,
                bound: bound.map(|bound| bound.take_axis(&place_alone, 0)).transpose()?,
            };
            Ok((row, history))
        };
        (0..).zip(self.rows.iter().zip(&self.state.generated)).map(history).collect()
    }
}

/// A key for each request, u64.
pub(super) fn keys(params: &[SamplingParams], stream: Stream) -> Array {
    let keys: Vec<_> = params.iter().map(|params| key(params.seed, stream)).collect();
    Array::from_slice(&keys, &[keys.len() as i32])
}

fn counts(histories: &[TokenHistory], vocabulary: i32) -> Result<Option<Counts>> {
    if histories.iter().all(|history| history.counts.is_none()) {
        return Ok(None);
    }
    let rows = histories.iter().map(|history| match &history.counts {
        Some(counts) => Ok(counts.clone()),
        None => Counts::none(vocabulary),
    });
    Ok(Some(Counts::stack(&rows.collect::<Result<Vec<_>>>()?)?))
}

fn recent(histories: &[TokenHistory], window: i32) -> Result<Option<Recent>> {
    if window == 0 {
        return Ok(None);
    }
    let rows = histories.iter().map(|history| match &history.recent {
        Some(recent) => recent.clone(),
        None => Recent::none(window),
    });
    Ok(Some(Recent::stack(&rows.collect::<Vec<_>>())?))
}

/// The bias of rows with so many tokens of output, where there is any.
fn bias(
    params: &[SamplingParams],
    generated: &[u32],
    steps: &[Step],
    vocabulary: i32,
) -> Result<Option<Array>> {
    if !steps.contains(&Step::Bias) {
        return Ok(None);
    }
    let mut bias = Bias::default();
    for (row, &generated) in params.iter().zip(generated) {
        bias.row(row, generated, vocabulary);
    }
    Ok(Some(bias.array(vocabulary)?))
}

/// The bounds of all rows, `[N]`; for a row that has none, one that nothing reaches.
fn bound(histories: &[TokenHistory]) -> Result<Option<Array>> {
    if histories.iter().all(|history| history.bound.is_none()) {
        return Ok(None);
    }
    let none = Array::from_slice(&[f32::INFINITY], &[1]);
    let rows = histories.iter().map(|history| history.bound.as_ref().unwrap_or(&none));
    Ok(Some(stack_all(rows)?.squeeze_axes(&[-1])?))
}
