//! How one request wants its tokens drawn, as plain data.

use std::{collections::HashSet, fmt::Display};

use super::filter::{check_k, check_min_p, check_top_p};
use crate::{check::Check, error::Result};

const OP: &str = "SamplingParams";

/// One step of a request's chain; what it does, its parameters in [`SamplingParams`] say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Step {
    /// `repetition_penalty`, `frequency_penalty` and `presence_penalty`.
    Penalties,
    /// `dry`.
    Dry,
    /// `logit_bias`, `allowed_tokens`, `banned_tokens`, and `stop_tokens` before `min_tokens`.
    Bias,
    /// `temperature`.
    Temperature,
    /// `top_n_sigma`.
    TopNSigma,
    /// `top_k`.
    TopK,
    /// `top_p`.
    TopP,
    /// `min_p`.
    MinP,
    /// `typical_p`.
    TypicalP,
    /// `xtc`.
    Xtc,
    /// `mirostat`.
    Mirostat,
}

impl Step {
    /// All steps, in the order in which a chain has them by default.
    pub const ALL: &[Self] = &[
        Self::Penalties,
        Self::Dry,
        Self::Bias,
        Self::Temperature,
        Self::TopNSigma,
        Self::TopK,
        Self::TopP,
        Self::MinP,
        Self::TypicalP,
        Self::Xtc,
        Self::Mirostat,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Penalties => "Penalties",
            Self::Dry => "Dry",
            Self::Bias => "Bias",
            Self::Temperature => "Temperature",
            Self::TopNSigma => "TopNSigma",
            Self::TopK => "TopK",
            Self::TopP => "TopP",
            Self::MinP => "MinP",
            Self::TypicalP => "TypicalP",
            Self::Xtc => "Xtc",
            Self::Mirostat => "Mirostat",
        }
    }

    /// Whether it changes logits, and does not choose among tokens by their probability.
    pub(super) fn adjusts(self) -> bool {
        matches!(self, Self::Penalties | Self::Dry | Self::Bias)
    }
}

/// "Exclude top choices": with some probability, all likely tokens but the least likely of them are dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct Xtc {
    /// How often this happens, from 0 to 1. Default: 0.
    pub probability: f32,
    /// Of the tokens at least this likely, from 0 to 1, all but the least likely go. Above 0.5
    /// there is never more than one of them. Default: 0.1.
    pub threshold: f32,
    /// Tokens that are never dropped, such as those that end a text or a line. Default: none.
    pub protected: Vec<u32>,
}

impl Default for Xtc {
    fn default() -> Self {
        Self { probability: 0.0, threshold: 0.1, protected: Vec::new() }
    }
}

/// "Don't repeat yourself": a token that would prolong a repetition loses
/// `multiplier · base^(n − allowed_length)`, where `n` tokens before it are the last `n` of the text.
#[derive(Debug, Clone, PartialEq)]
pub struct Dry {
    /// How strong the penalty is; 0 for none, the default.
    pub multiplier: f32,
    /// How much each further token of the repetition raises it, at least 1. Default: 1.75.
    pub base: f32,
    /// Repetitions of fewer tokens go free. Default: 2.
    pub allowed_length: u32,
    /// Repetitions are looked for among this many of the last tokens. Default: 1024.
    pub range: u32,
    /// Tokens that end a repetition, and are not penalized. Default: none.
    pub breakers: Vec<u32>,
}

impl Default for Dry {
    fn default() -> Self {
        Self { multiplier: 0.0, base: 1.75, allowed_length: 2, range: 1024, breakers: Vec::new() }
    }
}

/// Mirostat 2: tokens whose surprise, in bits, is above a bound go, and after each token the bound
/// moves by what its surprise was off `tau`.
///
/// Basu et al., [Mirostat](https://arxiv.org/abs/2007.14966), 2020.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mirostat {
    /// The surprise to keep to, in bits. Default: 5.
    pub tau: f32,
    /// How fast the bound, which starts at `2 · tau`, follows. Default: 0.1.
    pub eta: f32,
}

impl Default for Mirostat {
    fn default() -> Self {
        Self { tau: 5.0, eta: 0.1 }
    }
}

/// How one request wants its tokens drawn. The default draws from the model's own distribution.
///
/// A parameter at its default does nothing. `temperature = 0` takes the most likely token after
/// penalties, DRY and bias, and skips the other steps.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::SamplingParams;
///
/// let params = SamplingParams { temperature: 0.7, top_p: 0.9, seed: 7, ..Default::default() };
/// params.check(32_000)?;
/// let wrong = SamplingParams { banned_tokens: vec![32_000], ..params };
/// let message = "[SamplingParams] banned_tokens must hold ids below 32000 but got 32000";
/// assert_eq!(wrong.check(32_000).map_err(|error| error.to_string()), Err(message.to_owned()));
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Draws depend on this and on the position of each token. Default: 0.
    pub seed: u64,
    /// Divides the logits; 0 takes the most likely token. Default: 1.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens; 0 for all, the default.
    pub top_k: i32,
    /// Keeps the most likely tokens whose probability reaches this; 1 for all, the default.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely; 0 for all, the default.
    pub min_p: f32,
    /// Keeps the tokens whose surprise is nearest the expected one and whose probability reaches
    /// this; 1 for all, the default. Meister et al.,
    /// [Locally Typical Sampling](https://arxiv.org/abs/2202.00666), 2022.
    pub typical_p: f32,
    /// Keeps logits within this many standard deviations of the largest. Default: none. Tang et
    /// al., [Top-nσ](https://arxiv.org/abs/2411.07641), 2024.
    pub top_n_sigma: Option<f32>,
    /// Excludes top choices. Default: none.
    pub xtc: Option<Xtc>,
    /// Penalizes repeated passages. Default: none.
    pub dry: Option<Dry>,
    /// Holds the surprise of the text. Default: none.
    pub mirostat: Option<Mirostat>,
    /// Divides the positive logits of tokens in prompt or output and multiplies the negative ones;
    /// above 0, and 1 for none, the default. Keskar et al., [CTRL](https://arxiv.org/abs/1909.05858),
    /// 2019.
    pub repetition_penalty: f32,
    /// Taken from the logit of a token for each time it is in the output. Default: 0.
    pub frequency_penalty: f32,
    /// Taken from the logit of a token that is in the output. Default: 0.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens; several for one token add up. Default: none.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be drawn. Default: none, that is, all.
    pub allowed_tokens: Option<Vec<u32>>,
    /// Tokens that may not be drawn. Default: none.
    pub banned_tokens: Vec<u32>,
    /// Before this many tokens of output, no stop token is drawn. Default: 0.
    pub min_tokens: u32,
    /// The tokens that `min_tokens` forbids; in a request also those that end its texts. Default: none.
    pub stop_tokens: Vec<u32>,
    /// The steps, in order; each at most once. Default: [`Step::ALL`].
    pub chain: Vec<Step>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            seed: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            top_n_sigma: None,
            xtc: None,
            dry: None,
            mirostat: None,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_tokens: None,
            banned_tokens: Vec::new(),
            min_tokens: 0,
            stop_tokens: Vec::new(),
            chain: Step::ALL.to_vec(),
        }
    }
}

impl SamplingParams {
    /// Checks all of it, for a vocabulary of `vocabulary` tokens.
    ///
    /// # Errors
    /// When `vocabulary` is below one; when a number is not finite or outside the range its
    /// documentation gives; when a token id is not below `vocabulary`; when `allowed_tokens` is
    /// empty; or when the chain has a step twice, or lacks one whose parameters are set.
    pub fn check(&self, vocabulary: i32) -> Result<()> {
        Check::op(OP).at_least("vocabulary", vocabulary, 1)?;
        self.check_filters()?;
        self.check_penalties()?;
        self.check_tokens(vocabulary)?;
        self.check_chain()
    }

    /// Whether the most likely token is taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    fn check_filters(&self) -> Result<()> {
        let check = Check::op(OP);
        check.non_negative("temperature", self.temperature)?;
        check_k(OP, "top_k", self.top_k)?;
        check_top_p(OP, "top_p", self.top_p)?;
        check_min_p(OP, "min_p", self.min_p)?;
        check_top_p(OP, "typical_p", self.typical_p)?;
        if let Some(sigmas) = self.top_n_sigma {
            check.non_negative("top_n_sigma", sigmas)?;
        }
        if let Some(xtc) = &self.xtc {
            check_min_p(OP, "xtc.probability", xtc.probability)?;
            check_min_p(OP, "xtc.threshold", xtc.threshold)?;
        }
        if let Some(mirostat) = self.mirostat {
            check.positive("mirostat.tau", mirostat.tau)?;
            check.non_negative("mirostat.eta", mirostat.eta)?;
        }
        Ok(())
    }

    fn check_penalties(&self) -> Result<()> {
        let check = Check::op(OP);
        check.positive("repetition_penalty", self.repetition_penalty)?;
        check.finite("frequency_penalty", self.frequency_penalty)?;
        check.finite("presence_penalty", self.presence_penalty)?;
        let Some(dry) = &self.dry else { return Ok(()) };
        check.non_negative("dry.multiplier", dry.multiplier)?;
        let grows = dry.base.is_finite() && dry.base >= 1.0;
        check.value(grows, "dry.base", "be finite and at least 1", dry.base)?;
        check.value(
            dry.allowed_length > 0,
            "dry.allowed_length",
            "be at least 1",
            dry.allowed_length,
        )?;
        let fits = (1..=1 << 20).contains(&dry.range);
        check.value(fits, "dry.range", "be from 1 to 2^20", dry.range)
    }

    fn check_tokens(&self, vocabulary: i32) -> Result<()> {
        let ids = |name, ids: &[u32]| check_ids(OP, name, ids, vocabulary);
        ids("banned_tokens", &self.banned_tokens)?;
        ids("stop_tokens", &self.stop_tokens)?;
        let check = Check::op(OP);
        if let Some(allowed) = &self.allowed_tokens {
            check.value(!allowed.is_empty(), "allowed_tokens", "hold a token", "none")?;
            ids("allowed_tokens", allowed)?;
        }
        let left = self.has_something_to_draw(vocabulary);
        check.value(left, "banned_tokens", "leave a token to draw", "all")?;
        if let Some(xtc) = &self.xtc {
            ids("xtc.protected", &xtc.protected)?;
        }
        if let Some(dry) = &self.dry {
            ids("dry.breakers", &dry.breakers)?;
        }
        for &(token, bias) in &self.logit_bias {
            ids("logit_bias", &[token])?;
            check.finite("logit_bias", bias)?;
        }
        Ok(())
    }

    /// Whether a token may be drawn after so many of output.
    pub(crate) fn may_draw(&self, token: u32, generated: usize) -> bool {
        let allowed = self.allowed_tokens.as_ref().is_none_or(|allowed| allowed.contains(&token));
        allowed && !self.banned_after(generated).any(|&banned| banned == token)
    }

    /// What is banned after so many tokens of output.
    pub(super) fn banned_after(&self, generated: usize) -> impl Iterator<Item = &u32> {
        let early = generated < self.min_tokens as usize;
        self.banned_tokens.iter().chain(if early { &self.stop_tokens[..] } else { &[] })
    }

    /// Whether any token is allowed, not banned and, where there is a minimum of tokens, no stop.
    fn has_something_to_draw(&self, vocabulary: i32) -> bool {
        let banned: HashSet<_> = self.banned_after(0).collect();
        match &self.allowed_tokens {
            Some(allowed) => allowed.iter().any(|token| !banned.contains(token)),
            None => banned.len() < vocabulary.unsigned_abs() as usize,
        }
    }

    fn check_chain(&self) -> Result<()> {
        let check = Check::op(OP);
        for &step in Step::ALL {
            let times = self.chain.iter().filter(|&&other| other == step).count();
            let once = format_args!("hold {} once", step.name());
            let twice: &dyn Display = if times > 1 { &"it twice" } else { &"none" };
            check.value(times == 1 || times == 0 && !self.sets(step), "chain", once, twice)?;
        }
        Ok(())
    }

    /// Whether any parameter of `step` does something.
    pub(super) fn sets(&self, step: Step) -> bool {
        match step {
            Step::Penalties => {
                self.repetition_penalty != 1.0
                    || self.frequency_penalty != 0.0
                    || self.presence_penalty != 0.0
            }
            Step::Dry => self.dry.as_ref().is_some_and(|dry| dry.multiplier > 0.0),
            Step::Bias => {
                !self.logit_bias.is_empty()
                    || self.allowed_tokens.is_some()
                    || !self.banned_tokens.is_empty()
                    || self.min_tokens > 0 && !self.stop_tokens.is_empty()
            }
            Step::Temperature => self.temperature != 1.0,
            Step::TopNSigma => self.top_n_sigma.is_some(),
            Step::TopK => self.top_k > 0,
            Step::TopP => self.top_p < 1.0,
            Step::MinP => self.min_p > 0.0,
            Step::TypicalP => self.typical_p < 1.0,
            Step::Xtc => self.xtc.as_ref().is_some_and(|xtc| xtc.probability > 0.0),
            Step::Mirostat => self.mirostat.is_some(),
        }
    }

    /// The steps that do something, in order.
    pub(super) fn active(&self) -> Vec<Step> {
        let does = |&step: &Step| self.sets(step) && (!self.is_greedy() || step.adjusts());
        self.chain.iter().copied().filter(does).collect()
    }
}

/// Every id is below `vocabulary`.
pub(super) fn check_ids(
    op: &'static str,
    name: &'static str,
    ids: &[u32],
    vocabulary: i32,
) -> Result<()> {
    let wrong = ids.iter().find(|&&id| i64::from(id) >= i64::from(vocabulary));
    let expected = format_args!("hold ids below {vocabulary}");
    Check::op(op).value(wrong.is_none(), name, expected, wrong.copied().unwrap_or_default())
}
