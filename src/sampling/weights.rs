//! Probabilities as integers, whose sums do not depend on the order in which they are taken.

use mlx_rs::{Array, Dtype, ops::maximum};

use super::filter::shift;
use crate::{error::Result, uploads};

/// The weight of the most likely token is 2 to this. So the weights of [`MAX_VOCABULARY`] tokens
/// add up to less than 2^63, and a token is forgotten only below 2^-42 of the most likely one.
pub(super) const WEIGHT_BITS: i32 = 42;

/// The most tokens of which the weights can be added up.
pub(crate) const MAX_VOCABULARY: i32 = 1 << 20;

/// The weights of scores, `[..., V]` in f32, as i64; what may not be drawn weighs nothing.
pub(super) fn weights(scores: &Array) -> Result<Array> {
    weights_of_centred(&scores.subtract(shift(&scores.max_axis(-1, true)?)?)?)
}

/// The same of scores of which the largest is 0, or all are −∞.
pub(super) fn weights_of_centred(centred: &Array) -> Result<Array> {
    let unit = uploads::float((1_i64 << WEIGHT_BITS) as f32);
    Ok(centred.exp()?.multiply(unit)?.as_dtype(Dtype::Int64)?)
}

/// The natural logarithm of a sum of weights, in f32; a number for nothing, so that −∞ less it is
/// −∞.
pub(super) fn log_of(total: &Array) -> Result<Array> {
    let unit = uploads::float((1_i64 << WEIGHT_BITS) as f32);
    let total = total.as_dtype(Dtype::Float32)?.divide(unit)?;
    Ok(maximum(total.log()?, uploads::float(f32::MIN))?)
}

/// `fraction / 2^64` of `total`, rounded down, as i64; less than `total`. A unit or two may be
/// missing, because what the lower halves give together is left out.
pub(super) fn share(fraction: &Array, total: &Array) -> Result<Array> {
    let half = uploads::numbers(vec![1 << 32]);
    let total = total.as_dtype(Dtype::Uint64)?;
    let high = fraction.floor_divide(&half)?;
    let low = fraction.subtract(high.multiply(&half)?)?;
    let total_high = total.floor_divide(&half)?;
    let total_low = total.subtract(total_high.multiply(&half)?)?;
    let whole = high.multiply(&total_high)?;
    let of_high = high.multiply(total_low)?.floor_divide(&half)?;
    let of_low = low.multiply(total_high)?.floor_divide(half)?;
    Ok(whole.add(of_high)?.add(of_low)?.as_dtype(Dtype::Int64)?)
}

/// A number from 0 to 1 in units of 2^-64, at most 2^64 - 1 of them.
pub(super) fn fraction(value: f64) -> u64 {
    // The conversion saturates.
    (value * 2.0_f64.powi(64)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_less_than_all_and_right_but_for_a_unit_or_two() {
        let fractions = [0, 1, u64::MAX / 3, 1 << 32, (1 << 32) - 1, u64::MAX];
        let totals = [0, 1, 5, 1 << 43, (1 << 32) - 1, i64::MAX / 3, i64::MAX];
        for fraction in fractions {
            for total in totals {
                let exact = ((u128::from(fraction) * total as u128) >> 64) as i64;
                let arrays =
                    (Array::from_slice(&[fraction], &[1]), Array::from_slice(&[total], &[1]));
                let found =
                    share(&arrays.0, &arrays.1).ok().map(|share| share.as_slice::<i64>()[0]);
                let right =
                    |found| (exact - 2..=exact).contains(&found) && (found < total || total == 0);
                assert!(found.is_some_and(right), "{fraction} of {total}: {found:?}, not {exact}");
            }
        }
    }

    #[test]
    fn a_flat_vocabulary_adds_up_without_an_overflow() {
        assert!(i64::from(MAX_VOCABULARY).checked_mul(1 << WEIGHT_BITS).is_some());
    }

    #[test]
    fn fractions_saturate() {
        assert_eq!([0.0, 0.5, 1.0, 2.0].map(fraction), [0, 1 << 63, u64::MAX, u64::MAX]);
    }
}
