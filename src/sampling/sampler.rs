//! A reproducible sequence of draws.

use mlx_rs::{Array, random};

use super::{SamplingOptions, sample};
use crate::{
    error::Result,
    splitmix::{GOLDEN, scramble},
};

/// Draws token after token; the `i`-th draw depends on the seed and `i` alone.
///
/// So a seed reproduces a text whatever else the process drew, and a sampler a request keeps
/// requests apart.
///
/// # Example
/// ```
/// use mlx_primitives::sampling::{Sampler, SamplingOptions};
/// use mlx_rs::array;
///
/// let logits = array!([[0.0, 1.0, 2.0]]);
/// let mut sampler = Sampler::new(SamplingOptions::default(), 42)?;
/// let mut again = sampler.clone();
/// let (first, same) = (sampler.sample(&logits)?, again.sample(&logits)?);
/// assert!(first.all_close(same, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    seed: u64,
    draws: u64,
}

impl Sampler {
    /// A sampler that has drawn nothing yet.
    ///
    /// # Errors
    /// When an option is outside its range: see [`sample`].
    pub fn new(options: SamplingOptions, seed: u64) -> Result<Self> {
        options.check()?;
        Ok(Self { options, seed, draws: 0 })
    }

    /// Draws a token for each row of `logits`, `[..., V]`. A failure counts as no draw.
    ///
    /// # Errors
    /// When `logits` has no last axis or an empty one, or is not floating point.
    pub fn sample(&mut self, logits: impl AsRef<Array>) -> Result<Array> {
        let key = random::key(mix(self.seed, self.draws))?;
        let tokens = sample(logits, key, &self.options)?;
        self.draws += 1;
        Ok(tokens)
    }

    /// How many draws were made.
    pub fn draws(&self) -> u64 {
        self.draws
    }

    /// The options it draws with.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }
}

/// Sixty-four well mixed bits of a seed and a draw: the rows of a draw take neighbouring keys, so
/// the keys of two draws must not be neighbours.
fn mix(seed: u64, draw: u64) -> u64 {
    scramble(scramble(seed).wrapping_add(draw.wrapping_mul(GOLDEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_draws_are_mixed_apart() {
        let keys: std::collections::HashSet<_> =
            (0..64).flat_map(|seed| (0..64).map(move |draw| mix(seed, draw) >> 32)).collect();
        assert_eq!(keys.len(), 64 * 64);
    }
}
