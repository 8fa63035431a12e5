//! How checkpoints stretch their frequencies to sequences longer than they were trained on.

use std::f64::consts::TAU;

use super::{RopeFrequencies, Yarn, turning::check_dims};
use crate::{check::Check, error::Result};

/// How the frequencies of a checkpoint are changed, so that it reads longer sequences than it was
/// trained on.
///
/// Plain data, as a checkpoint's configuration holds it. Below, `L` is the length trained on
/// (`original_max_positions`) and `θ = base^(-2i/dims)` the frequency of pair `i`.
///
/// # Example
/// ```
/// use mlx_primitives::rope::RopeScaling;
///
/// let frequencies = RopeScaling::Linear { factor: 4.0 }.frequencies(4, 10_000.0, 1)?;
/// assert_eq!(frequencies.inverse, [0.25, 0.0025]);
/// assert_eq!(frequencies.magnitude, 1.0);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum RopeScaling {
    /// `θ`.
    #[default]
    None,
    /// `θ / factor`: positions move closer together.
    ///
    /// Chen et al., [Extending Context Window of Large Language Models via Positional
    /// Interpolation](https://arxiv.org/abs/2306.15595), 2023.
    Linear {
        /// How many times longer.
        factor: f32,
    },
    /// `base · factor^(dims/(dims - 2))` for `base`: the first pair keeps its frequency, the last
    /// has it divided by `factor`.
    Ntk {
        /// How many times longer.
        factor: f32,
    },
    /// [`Self::Ntk`] by `factor·n/L - (factor - 1)` for a sequence of `n > L` positions; `θ` up to
    /// `L`.
    DynamicNtk {
        /// How fast the base grows with the length.
        factor: f32,
        /// The length trained on.
        original_max_positions: i32,
    },
    /// `θ` for pairs that turn more than `high_freq_factor` times in `L` positions, `θ / factor` for
    /// those that turn less than `low_freq_factor` times, and a blend of both, linear in the number
    /// of turns, between.
    ///
    /// Grattafiori et al., [The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783), 2024.
    Llama3 {
        /// How many times longer.
        factor: f32,
        /// Pairs that turn less often in `L` positions are interpolated.
        low_freq_factor: f32,
        /// Pairs that turn more often in `L` positions are left alone.
        high_freq_factor: f32,
        /// The length trained on.
        original_max_positions: i32,
    },
    /// A blend of `θ` and `θ / factor` for each pair, and a temperature.
    Yarn(Yarn),
    /// `θ` divided by a factor of each pair's own, found by search, and a magnitude of
    /// `sqrt(1 + ln(max_positions / L) / ln(L))`, or one where that is less.
    ///
    /// Ding et al., [LongRoPE: Extending LLM Context Window Beyond 2 Million
    /// Tokens](https://arxiv.org/abs/2402.13753), 2024; the magnitude is that of the Phi-3
    /// checkpoints.
    LongRope {
        /// `[dims/2]`: the factors for sequences of up to `L` positions.
        short_factor: Vec<f32>,
        /// `[dims/2]`: the factors for longer ones.
        long_factor: Vec<f32>,
        /// The length trained on.
        original_max_positions: i32,
        /// The length stretched to.
        max_positions: i32,
    },
}

impl RopeScaling {
    /// The frequencies of `dims` elements in a sequence of `sequence_length` positions, which only
    /// [`Self::DynamicNtk`] and [`Self::LongRope`] read.
    ///
    /// # Errors
    /// When `dims` is odd or below two, when `base` or a factor is not finite and above zero, when a
    /// list of factors is not `dims/2` long, when a number of positions is below one (two for
    /// `LongRope`), when the upper bound of a blend is not above the lower one, or when `base` is
    /// not above one under `Yarn`.
    pub fn frequencies(
        &self,
        dims: i32,
        base: f32,
        sequence_length: i32,
    ) -> Result<RopeFrequencies> {
        let check = Check::op("RopeScaling");
        check_dims(check, dims)?;
        check.positive("base", base)?;
        self.check(check, dims, base)?;
        let plain = RopeFrequencies::of_base(dims, base);
        Ok(match self {
            Self::None => plain,
            Self::Linear { factor } => plain.map(|_, frequency| frequency / f64::from(*factor)),
            Self::Ntk { factor } => ntk(dims, base, (*factor).into()),
            Self::DynamicNtk { factor, original_max_positions } => {
                let longer = f64::from(sequence_length) / f64::from(*original_max_positions);
                ntk(dims, base, 1.0 + f64::from(*factor) * (longer - 1.0).max(0.0))
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let bounds = (*low_freq_factor, *high_freq_factor);
                plain.map(|_, frequency| {
                    let kept = kept_by_turns(frequency, *original_max_positions, bounds);
                    blend(frequency, kept, *factor)
                })
            }
            Self::Yarn(yarn) => yarn.apply(plain, base),
            Self::LongRope { short_factor, long_factor, original_max_positions, max_positions } => {
                let is_long = sequence_length > *original_max_positions;
                let factors = if is_long { long_factor } else { short_factor };
                let magnitude = long_rope_magnitude(*original_max_positions, *max_positions);
                let divide = |pair: usize, frequency| frequency / f64::from(factors[pair]);
                RopeFrequencies { magnitude, ..plain.map(divide) }
            }
        })
    }

    /// Whether [`Self::frequencies`] reads the length of the sequence.
    pub(super) fn follows_length(&self) -> bool {
        matches!(self, Self::DynamicNtk { .. } | Self::LongRope { .. })
    }

    fn check(&self, check: Check, dims: i32, base: f32) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } | Self::Ntk { factor } => check.positive("factor", *factor),
            Self::DynamicNtk { factor, original_max_positions } => {
                check.positive("factor", *factor)?;
                check.at_least("original_max_positions", *original_max_positions, 1)
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                check.positive("factor", *factor)?;
                check.positive("low_freq_factor", *low_freq_factor)?;
                check_above(check, "high_freq_factor", *high_freq_factor, *low_freq_factor)?;
                check.at_least("original_max_positions", *original_max_positions, 1)
            }
            Self::Yarn(yarn) => yarn.check(check, base),
            Self::LongRope { short_factor, long_factor, original_max_positions, max_positions } => {
                check_factors(check, "short_factor", short_factor, dims)?;
                check_factors(check, "long_factor", long_factor, dims)?;
                check.at_least("original_max_positions", *original_max_positions, 2)?;
                check.at_least("max_positions", *max_positions, 1)
            }
        }
    }
}

fn check_factors(check: Check, name: &'static str, factors: &[f32], dims: i32) -> Result<()> {
    let pairs = dims as usize / 2;
    let expected = format_args!("hold dims/2 = {pairs} numbers");
    check.value(factors.len() == pairs, name, expected, factors.len())?;
    factors.iter().try_for_each(|&factor| check.positive(name, factor))
}

/// `value` is finite and above `bound`.
pub(super) fn check_above(check: Check, name: &'static str, value: f32, bound: f32) -> Result<()> {
    let holds = value.is_finite() && value > bound;
    check.value(holds, name, format_args!("be finite and above {bound}"), value)
}

fn ntk(dims: i32, base: f32, factor: f64) -> RopeFrequencies {
    let dims_f64 = f64::from(dims);
    RopeFrequencies::of_base(dims, f64::from(base) * factor.powf(dims_f64 / (dims_f64 - 2.0)))
}

/// `frequency` for the part that is kept, `frequency / factor` for the rest.
pub(super) fn blend(frequency: f64, kept: f64, factor: f32) -> f64 {
    frequency * (kept + (1.0 - kept) / f64::from(factor))
}

/// How much of a frequency to keep by how often it turns in `positions`: nothing at the lower bound
/// and below, all of it at the upper bound and above.
pub(super) fn kept_by_turns(frequency: f64, positions: i32, bounds: (f32, f32)) -> f64 {
    let (lower, upper) = (f64::from(bounds.0), f64::from(bounds.1));
    let turns = f64::from(positions) * frequency / TAU;
    ((turns - lower) / (upper - lower)).clamp(0.0, 1.0)
}

fn long_rope_magnitude(original_max_positions: i32, max_positions: i32) -> f64 {
    let original = f64::from(original_max_positions);
    let longer = (f64::from(max_positions) / original).max(1.0);
    (1.0 + longer.ln() / original.ln()).sqrt()
}

#[cfg(test)]
mod tests;
