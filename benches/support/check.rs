//! Whether a result is right, before anybody asks how fast it came.

use anyhow::{Result, ensure};
use mlx_rs::{Array, Dtype};

/// `|got - expected| <= atol + rtol * |expected|`, where `expected` was computed in f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    rtol: f32,
    atol: f32,
}

impl Tolerance {
    /// For one rounding of the result to `dtype`, and some of the terms of a sum in f32.
    pub(crate) fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float16 => Self { rtol: 1e-3, atol: 1e-4 },
            Dtype::Bfloat16 => Self { rtol: 8e-3, atol: 1e-3 },
            _ => Self { rtol: 1e-5, atol: 1e-6 },
        }
    }

    /// The same with more room around zero; the caller says why.
    pub(crate) fn with_atol(self, atol: f32) -> Self {
        Self { atol: self.atol.max(atol), ..self }
    }

    /// For what a user of MLX writes: it must compute the same, yet may round after each of a few
    /// ops, also numbers of some size that cancel later, as the 1 + erf of GELU does, or the terms
    /// of a weight's gradient before their sum.
    pub(crate) fn of_baseline(self, dtype: Dtype) -> Self {
        let unit = match dtype {
            Dtype::Float16 => 2.0_f32.powi(-10),
            Dtype::Bfloat16 => 2.0_f32.powi(-7),
            _ => f32::EPSILON,
        };
        Self { rtol: 4.0 * self.rtol, atol: (8.0 * self.atol).max(16.0 * unit) }
    }
}

/// The largest distance of any element from what was expected.
///
/// Fails at shapes, dtypes or elements that differ by more than they may; a NaN does.
pub(crate) fn compare(
    got: &[Array],
    expected: &[Array],
    dtype: Dtype,
    tolerance: Tolerance,
) -> Result<f64> {
    ensure!(got.len() == expected.len(), "{} results, not {}", got.len(), expected.len());
    let mut largest = 0.0_f64;
    for (got, expected) in got.iter().zip(expected) {
        largest = largest.max(distance(got, expected, dtype, tolerance)?);
    }
    Ok(largest)
}

fn distance(got: &Array, expected: &Array, dtype: Dtype, tolerance: Tolerance) -> Result<f64> {
    ensure!(got.dtype() == dtype, "dtype {:?}, not {dtype:?}", got.dtype());
    let (found, wanted) = (got.shape(), expected.shape());
    ensure!(found == wanted, "shape {found:?}, not {wanted:?}");
    let [got, expected] = [got, expected].map(|array| array.as_dtype(Dtype::Float32));
    let (got, expected) = (got?, expected?);
    let error = got.subtract(&expected)?.abs()?;
    let allowed = expected.abs()?.multiply(Array::from_f32(tolerance.rtol))?;
    let allowed = allowed.add(Array::from_f32(tolerance.atol))?;
    // A comparison with NaN is false, which is the answer wanted for it; infinity allows itself.
    let close = error.le(&allowed)?.all(None)?.try_item_cast::<bool>()?;
    let largest = error.max(None)?.try_item_cast::<f32>()?;
    ensure!(close && largest.is_finite(), "off by up to {largest:.3e}, beyond {tolerance:?}");
    Ok(largest.into())
}
