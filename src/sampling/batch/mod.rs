//! Many requests, each with parameters of its own, drawn for together.

mod conditions;
mod group;
mod masked;
mod report;
mod settings;

pub use conditions::{Conditions, Proposal};
pub use report::{LogProbabilities, TopLogProbabilities};
pub(super) use settings::dry_of;

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, zeros_dtype},
};

use self::{
    group::{Group, GroupDraw},
    masked::Masked,
};
use super::{
    SamplingParams, TokenHistory, filter::checked_vocabulary, history::check_vocabulary, rows,
};
use crate::{
    check::{Check, axes},
    dispatch::Dispatch,
    error::Result,
};

const OP: &str = "SamplerBatch";

/// Options of a [`SamplerBatch`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SamplerBatchOptions {
    /// Which distribution log-probabilities are those of.
    pub log_probabilities: LogProbabilities,
    /// How many of the most likely tokens to report beside the one drawn. Default: 0.
    pub top: i32,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// What was drawn for each row.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// The tokens, `[N]`, u32.
    pub tokens: Array,
    /// The log-probability of each, `[N]`, f32. A row with nothing to draw from has token 0 of −∞
    /// or NaN.
    pub log_probabilities: Array,
    /// The most likely tokens of each row, where they were asked for.
    pub top: Option<TopLogProbabilities>,
    /// What each surprised its row's Mirostat by, `[N]`; there where any row has one.
    surprise: Option<Array>,
}

/// Draws for the requests of one batch, for as long as the batch has these requests.
///
/// A row's token depends on its logits, its parameters, its history and its position, and on
/// nothing else in the batch. Rows whose steps are among temperature, top-k, top-p and min-p, in
/// this order, are drawn together, and the others by groups of equal chains.
///
/// A token weighs `floor(2^42 · exp(score))`, where the best score is 0, and the first is drawn up to
/// which the weights add up to more than `u` of their sum; `u` comes from the request's seed and the
/// row's position. Nothing is read on the host, so a step may be asked for before the tokens of the
/// last are known.
///
/// # Backends
/// `Kernel` tempers, filters by top-k, top-p and min-p, and draws, in one launch and without a sort;
/// other steps are compositions before it. It checks no proposed tokens. `Reference` is plain ops, with a sort where there is a
/// top-k or a top-p. Both draw by the same bits; as their weights differ by rounding, so may a token,
/// once in millions. `Auto` takes the kernel where it was measured to win.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::{SamplerBatch, SamplingParams, TokenHistory};
/// use mlx_rs::array;
///
/// let vocabulary = 4;
/// let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
/// let careful = SamplingParams { top_p: 0.9, presence_penalty: 1.0, seed: 7, ..Default::default() };
/// let requests = [greedy, careful].map(|params| {
///     let history = TokenHistory::new(&params, vocabulary, &[3, 1], &[])?;
///     Ok((params, history))
/// });
/// let requests = requests.into_iter().collect::<mlx_primitives::Result<Vec<_>>>()?;
/// let mut batch = SamplerBatch::new(requests, vocabulary, Default::default())?;
/// let logits = array!([[0.0, 1.0, 9.0, 2.0], [0.0, 9.0, 1.0, 2.0]]);
/// let sampled = batch.sample(&logits, &array!([2, 2]))?;
/// batch.advance(&sampled)?;
/// assert_eq!(sampled.tokens.as_slice::<u32>(), [2, 1]);
/// let histories = batch.into_histories()?;
/// assert_eq!(histories[1].generated(), 1);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SamplerBatch {
    vocabulary: i32,
    rows: i32,
    options: SamplerBatchOptions,
    groups: Vec<Group>,
    /// Where each row is in what the groups give one after another; none where in order.
    order: Option<Array>,
}

impl SamplerBatch {
    /// The requests in the order of their rows, each with its history.
    ///
    /// # Errors
    /// When `vocabulary` is not from 1 to 2^20, when `options.top` is negative or above
    /// `vocabulary`, when a request's parameters do not pass their
    /// [`check`](SamplingParams::check), or when a history is of another vocabulary or of
    /// parameters with other steps.
    pub fn new(
        requests: Vec<(SamplingParams, TokenHistory)>,
        vocabulary: i32,
        options: SamplerBatchOptions,
    ) -> Result<Self> {
        let check = Check::op(OP);
        check_vocabulary(OP, vocabulary)?;
        let top = format_args!("be from 0 to {vocabulary}");
        check.value((0..=vocabulary).contains(&options.top), "top", top, options.top)?;
        for (params, history) in &requests {
            params.check(vocabulary)?;
            let fits = history.vocabulary == vocabulary && history.serves(params);
            check.value(fits, "history", "be of these parameters and vocabulary", "another")?;
        }
        let rows = requests.len() as i32;
        let groups = Group::of_requests(requests, vocabulary)?;
        let order = order(&groups);
        Ok(Self { vocabulary, rows, options, groups, order })
    }

    /// Draws a token for each row of `logits`. The batch stays as it is until [`advance`](Self::advance).
    ///
    /// # Shapes
    /// - `logits`: `[N, V]`, f32, f16 or bf16
    /// - `positions`: `[N]`, integers from 0 to 2^31 - 1: what a row's draw depends on beside its seed, so
    ///   another for each token of a request
    ///
    /// # Errors
    /// When `logits` or `positions` has another shape, when `logits` is not floating point or
    /// `positions` holds no integers, or when a backend was asked for that cannot run.
    pub fn sample(
        &self,
        logits: impl AsRef<Array>,
        positions: impl AsRef<Array>,
    ) -> Result<Sampled> {
        self.sample_under(logits, positions, &Conditions::default())
    }

    /// Draws a token for each row of `logits` under conditions.
    ///
    /// A row with a mask draws from the mask's tokens only, as if the others had logits of −∞; [raw](LogProbabilities::Raw)
    /// log-probabilities stay those of the unmasked logits. A row with a proposal keeps the proposed token with probability
    /// `min(1, p / q)`, where `p` is its own probability and `q` that of the proposal, and otherwise draws from the residual
    /// `max(p − q, 0)`, normalized; its distribution is `p` either way. This is how the drafts of a cheaper model are checked. Rows
    /// with neither draw as by [`sample`](Self::sample).
    ///
    /// Leviathan et al., [Fast Inference from Transformers via Speculative Decoding](https://arxiv.org/abs/2211.17192), 2023;
    /// Chen et al., [Accelerating Large Language Model Decoding with Speculative
    /// Sampling](https://arxiv.org/abs/2302.01318), 2023.
    ///
    /// # Shapes
    /// Those of [`sample`](Self::sample), and those of [`Conditions`] and [`Proposal`].
    ///
    /// # Errors
    /// As for [`sample`](Self::sample); when there are masks, but not one for each row, or one is of another vocabulary; and
    /// when a proposal has other shapes or dtypes than it should. A mask of nothing is no error: its row has nothing to draw
    /// from.
    pub fn sample_under(
        &self,
        logits: impl AsRef<Array>,
        positions: impl AsRef<Array>,
        conditions: &Conditions,
    ) -> Result<Sampled> {
        let logits = logits.as_ref();
        let positions = &self.checked(logits, positions.as_ref())?;
        conditions.check(Check::op(OP), [self.rows, self.vocabulary])?;
        let masked = &Masked::of(logits, conditions.masks)?;
        let draw = |group: &Group| {
            group.draw(logits, masked.as_ref(), positions, conditions.proposal, &self.options)
        };
        self.together(&self.groups.iter().map(draw).collect::<Result<Vec<_>>>()?)
    }

    /// What [`sample`](Self::sample) draws each row's token by, `[N, V]`, f32: the probabilities after all steps; of a greedy
    /// row that of the best is 1.
    ///
    /// # Errors
    /// As for [`sample`](Self::sample).
    pub fn probabilities(
        &self,
        logits: impl AsRef<Array>,
        positions: impl AsRef<Array>,
    ) -> Result<Array> {
        let (logits, positions) =
            (logits.as_ref(), self.checked(logits.as_ref(), positions.as_ref())?);
        let parts = self.groups.iter().map(|group| group.probabilities(logits, &positions));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        self.joined(parts.iter(), || Ok(zeros_dtype(&[0, self.vocabulary], Dtype::Float32)?))
    }

    /// Checks the arrays of a draw, and returns the positions as i32.
    fn checked(&self, logits: &Array, positions: &Array) -> Result<Array> {
        let check = Check::op(OP);
        checked_vocabulary(check, logits)?;
        check.shape("logits", logits, axes![self.rows, self.vocabulary])?;
        check.integer("positions", positions)?;
        check.shape("positions", positions, axes![self.rows])?;
        Ok(positions.as_dtype(Dtype::Int32)?)
    }

    /// Takes what was drawn into the histories of its rows.
    ///
    /// # Errors
    /// When `sampled` is not of this batch: when it has another number of rows.
    pub fn advance(&mut self, sampled: &Sampled) -> Result<()> {
        let check = Check::op(OP);
        check.shape("sampled.tokens", &sampled.tokens, axes![self.rows])?;
        check.dtype_among("sampled.tokens", &sampled.tokens, &[Dtype::Uint32])?;
        let advanced = self.groups.iter().map(|group| group.advanced(sampled));
        let advanced = advanced.collect::<Result<Vec<_>>>()?;
        for (group, state) in self.groups.iter_mut().zip(advanced) {
            group.state = state;
        }
        Ok(())
    }

    /// The histories of all requests, in the order of their rows: for a batch of other requests.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn into_histories(self) -> Result<Vec<TokenHistory>> {
        let mut histories = Vec::new();
        for group in self.groups {
            histories.extend(group.into_histories()?);
        }
        histories.sort_by_key(|(row, _)| *row);
        Ok(histories.into_iter().map(|(_, history)| history).collect())
    }

    /// What the groups drew, in the order of the rows.
    fn together(&self, draws: &[GroupDraw]) -> Result<Sampled> {
        let surprise = draws.iter().any(|draw| draw.surprise.is_some());
        let surprises = draws.iter().map(|draw| match &draw.surprise {
            Some(surprise) => Ok(surprise.clone()),
            None => Ok(zeros_dtype(draw.tokens.shape(), Dtype::Float32)?),
        });
        let surprises = surprises.collect::<Result<Vec<_>>>()?;
        let empty = |dtype| Ok(zeros_dtype(&[0], dtype)?);
        Ok(Sampled {
            tokens: self.joined(draws.iter().map(|draw| &draw.tokens), || empty(Dtype::Uint32))?,
            log_probabilities: self
                .joined(draws.iter().map(|draw| &draw.log_probabilities), || {
                    empty(Dtype::Float32)
                })?,
            top: self.tops(draws)?,
            surprise: match surprise {
                true => Some(self.joined(surprises.iter(), || empty(Dtype::Float32))?),
                false => None,
            },
        })
    }

    fn tops(&self, draws: &[GroupDraw]) -> Result<Option<TopLogProbabilities>> {
        if self.options.top == 0 {
            return Ok(None);
        }
        let tops: Vec<_> = draws.iter().filter_map(|draw| draw.top.as_ref()).collect();
        let empty = |dtype| Ok(zeros_dtype(&[0, self.options.top], dtype)?);
        Ok(Some(TopLogProbabilities {
            tokens: self.joined(tops.iter().map(|top| &top.tokens), || empty(Dtype::Uint32))?,
            log_probabilities: self
                .joined(tops.iter().map(|top| &top.log_probabilities), || empty(Dtype::Float32))?,
        }))
    }

    fn joined<'a>(
        &self,
        parts: impl Iterator<Item = &'a Array>,
        empty: impl Fn() -> Result<Array>,
    ) -> Result<Array> {
        let parts: Vec<_> = parts.collect();
        let all = match parts[..] {
            [] => return empty(),
            [one] => one.clone(),
            _ => concatenate(&parts, 0)?,
        };
        Ok(match &self.order {
            Some(order) => all.take_axis(order, 0)?,
            None => all,
        })
    }
}

/// Where each row is among the rows of the groups, where that is not its own place.
fn order(groups: &[Group]) -> Option<Array> {
    let rows: Vec<_> = groups.iter().flat_map(|group| group.rows.iter().copied()).collect();
    let mut order: Vec<_> = (0..rows.len() as u32).collect();
    order.sort_by_key(|&place| rows[place as usize]);
    let in_order = order.iter().copied().eq(0..rows.len() as u32);
    (!in_order).then(|| Array::from_slice(&order, &[order.len() as i32]))
}
