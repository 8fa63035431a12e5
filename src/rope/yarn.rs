//! YaRN: interpolation by frequency, with a temperature.

use std::f64::consts::TAU;

use super::{
    RopeFrequencies,
    scaling::{blend, check_above, kept_by_turns},
};
use crate::{check::Check, error::Result};

/// How much of each pair's frequency YaRN keeps, between the pairs that it keeps whole and those
/// that it interpolates.
///
/// With `L` the length trained on, pair `i` turns `r = L·θ/2π` times in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum YarnRamp {
    /// Linear in `i`, between the pairs that would turn `beta_fast` and `beta_slow` times, rounded
    /// outwards to whole pairs: what the paper's authors released, and so what checkpoints expect.
    #[default]
    WholePairs,
    /// The same without the rounding: GPT-OSS, whose configuration says `truncate: false`.
    Pairs,
    /// Linear in `r`, between `beta_slow` and `beta_fast`: the paper's own equations.
    Turns,
}

/// [`RopeScaling::Yarn`](super::RopeScaling::Yarn): `θ·(γ + (1 - γ)/factor)`, where `γ` falls from one
/// for pairs that turn often to zero for those that hardly turn, and a magnitude
/// `(0.1·mscale·ln(factor) + 1) / (0.1·mscale_all_dims·ln(factor) + 1)`.
///
/// The magnitude multiplies queries and keys, and so its square the attention scores: it is the
/// paper's temperature, `sqrt(1/t)`.
///
/// # Example
/// ```
/// use mlx_primitives::rope::{RopeScaling, Yarn};
///
/// let scaling = RopeScaling::Yarn(Yarn { beta_fast: 64.0, ..Yarn::new(4.0, 32_768) });
/// let frequencies = scaling.frequencies(128, 1e6, 1)?;
/// assert_eq!(frequencies.inverse[0], 1.0);
/// assert!((frequencies.magnitude - 1.138_629).abs() < 1e-6);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Peng et al., [YaRN: Efficient Context Window Extension of Large Language
/// Models](https://arxiv.org/abs/2309.00071), 2023.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times longer.
    pub factor: f32,
    /// The length trained on.
    pub original_max_positions: i32,
    /// Pairs that turn this often or more keep their frequency; the paper's β.
    pub beta_fast: f32,
    /// Pairs that turn this seldom or less are interpolated; the paper's α.
    pub beta_slow: f32,
    /// The ramp between the two.
    pub ramp: YarnRamp,
    /// The magnitude instead of the formula's.
    pub attention_factor: Option<f32>,
    /// Weighs the logarithm in the magnitude's numerator.
    pub mscale: f32,
    /// Weighs the logarithm in the magnitude's denominator.
    pub mscale_all_dims: f32,
}

impl Yarn {
    /// The default of [`Yarn::beta_fast`].
    pub const DEFAULT_BETA_FAST: f32 = 32.0;
    /// The default of [`Yarn::beta_slow`].
    pub const DEFAULT_BETA_SLOW: f32 = 1.0;
    /// The default of [`Yarn::mscale`].
    pub const DEFAULT_MSCALE: f32 = 1.0;
    /// The default of [`Yarn::mscale_all_dims`]: a denominator of one.
    pub const DEFAULT_MSCALE_ALL_DIMS: f32 = 0.0;

    /// The paper's parameters for a context `factor` times as long as the one trained on.
    pub const fn new(factor: f32, original_max_positions: i32) -> Self {
        Self {
            factor,
            original_max_positions,
            beta_fast: Self::DEFAULT_BETA_FAST,
            beta_slow: Self::DEFAULT_BETA_SLOW,
            ramp: YarnRamp::WholePairs,
            attention_factor: None,
            mscale: Self::DEFAULT_MSCALE,
            mscale_all_dims: Self::DEFAULT_MSCALE_ALL_DIMS,
        }
    }

    pub(super) fn check(&self, check: Check, base: f32) -> Result<()> {
        check_above(check, "base", base, 1.0)?;
        check.positive("factor", self.factor)?;
        check.at_least("original_max_positions", self.original_max_positions, 1)?;
        check.positive("beta_slow", self.beta_slow)?;
        check_above(check, "beta_fast", self.beta_fast, self.beta_slow)?;
        check.non_negative("mscale", self.mscale)?;
        check.non_negative("mscale_all_dims", self.mscale_all_dims)?;
        self.attention_factor.map_or(Ok(()), |factor| check.positive("attention_factor", factor))
    }

    pub(super) fn apply(&self, plain: RopeFrequencies, base: f32) -> RopeFrequencies {
        let dims = 2.0 * plain.inverse.len() as f64;
        let pairs = self.pair_bounds(dims, base.into());
        let stretched = plain.map(|pair, frequency| {
            let kept = match self.ramp {
                YarnRamp::WholePairs | YarnRamp::Pairs => kept_by_pair(pair as f64, pairs),
                YarnRamp::Turns => {
                    let bounds = (self.beta_slow, self.beta_fast);
                    kept_by_turns(frequency, self.original_max_positions, bounds)
                }
            };
            blend(frequency, kept, self.factor)
        });
        RopeFrequencies { magnitude: self.magnitude(), ..stretched }
    }

    /// The last pair whose frequency is kept and the first that is interpolated.
    fn pair_bounds(&self, dims: f64, base: f64) -> (f64, f64) {
        let pair_that_turns = |times: f32| {
            let positions_a_turn = f64::from(self.original_max_positions) / f64::from(times);
            dims * (positions_a_turn / TAU).ln() / (2.0 * base.ln())
        };
        let (first, last) = (pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow));
        let (first, last) = match self.ramp {
            YarnRamp::WholePairs => (first.floor(), last.ceil()),
            YarnRamp::Pairs | YarnRamp::Turns => (first, last),
        };
        (first.max(0.0), last.min(dims - 1.0))
    }

    fn magnitude(&self) -> f64 {
        let logarithm = f64::from(self.factor).max(1.0).ln();
        let weighed = |mscale| 0.1 * f64::from(mscale) * logarithm + 1.0;
        let formula = || weighed(self.mscale) / weighed(self.mscale_all_dims);
        self.attention_factor.map_or_else(formula, f64::from)
    }
}

/// One up to `first`, zero from `last` on, linear between.
fn kept_by_pair(pair: f64, (first, last): (f64, f64)) -> f64 {
    // The released code's guard against a ramp of no width.
    const LEAST_WIDTH: f64 = 0.001;
    let width = if first == last { LEAST_WIDTH } else { last - first };
    1.0 - ((pair - first) / width).clamp(0.0, 1.0)
}
