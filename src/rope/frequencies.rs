//! The angle that each pair of elements is rotated by, as plain numbers.

use std::f64::consts::TAU;

use mlx_rs::Array;

use crate::{check::Check, error::Result, uploads};

/// The angle that each pair of elements is rotated by at each position, and what the rotated elements are
/// multiplied by.
///
/// Plain f64 numbers on the host: a checkpoint's frequencies can be written down, compared and
/// changed, and no precision is lost before the op itself.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// `[dims/2]`: the radians that pair `i` is rotated by at each position, such as `base^(-2i/dims)`.
    /// Zero leaves a pair alone. These are not the periods that MLX's op calls `freqs`, which are
    /// one over them.
    pub inverse: Vec<f64>,
    /// Multiplies the rotated elements, both of queries and of keys; one unless a scaling asks for a
    /// temperature.
    pub magnitude: f64,
}

impl From<Vec<f64>> for RopeFrequencies {
    fn from(inverse: Vec<f64>) -> Self {
        Self { inverse, magnitude: 1.0 }
    }
}

impl RopeFrequencies {
    /// `base^(-2i/dims)` for each pair `i`.
    pub(super) fn of_base(dims: i32, base: impl Into<f64>) -> Self {
        let base = base.into();
        let exponent = |pair| -2.0 * f64::from(pair) / f64::from(dims);
        (0..dims / 2).map(|pair| base.powf(exponent(pair))).collect::<Vec<_>>().into()
    }

    /// The same with each frequency changed by `change(pair, frequency)`.
    pub(super) fn map(mut self, change: impl Fn(usize, f64) -> f64) -> Self {
        for (pair, frequency) in self.inverse.iter_mut().enumerate() {
            *frequency = change(pair, *frequency);
        }
        self
    }

    pub(super) fn check(&self, check: Check, dims: i32) -> Result<()> {
        let (pairs, found) = (dims as usize / 2, self.inverse.len());
        let expected = format_args!("hold dims/2 = {pairs} numbers");
        check.value(found == pairs, "frequencies", expected, found)?;
        for &frequency in &self.inverse {
            check.finite("frequencies", frequency as f32)?;
        }
        check.positive("frequencies.magnitude", self.magnitude as f32)
    }

    /// `[dims/2]`, f32: positions per radian, which is what MLX's op divides positions by.
    pub(super) fn periods(&self) -> Array {
        uploads::floats(self.inverse.iter().map(|frequency| (1.0 / frequency) as f32))
    }

    /// `[dims/2]`, u64: what each position turns a pair by, in units of 2⁻⁶⁴ turns.
    pub(crate) fn turns(&self) -> Array {
        let units = |frequency: &f64| ((frequency / TAU).rem_euclid(1.0) * 2.0_f64.powi(64)) as u64;
        uploads::numbers(self.inverse.iter().map(units).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_their_periods() {
        let [first, again, other] =
            [4, 4, 8].map(|dims| RopeFrequencies::of_base(dims, 100.0).periods());
        assert_eq!(first.as_slice::<f32>()[1], 10.0);
        assert_eq!(first.as_slice::<f32>().as_ptr(), again.as_slice::<f32>().as_ptr());
        assert_ne!(first.as_slice::<f32>().as_ptr(), other.as_slice::<f32>().as_ptr());
    }
}
