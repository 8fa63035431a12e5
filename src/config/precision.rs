//! When half precision is safe.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{check::Check, error::Result};

/// Limits under which [`fits_float16`] answers yes.
#[derive(Debug, Clone)]
pub struct Float16Limits {
    /// The longest sum, in elements, that may be accumulated; longer ones lose low bits. Default: 8192.
    pub max_terms: i32,
    /// The largest magnitude that may occur. f16 itself ends at 65504; products need room below. Default: 1000.
    pub max_magnitude: f32,
}

impl Default for Float16Limits {
    fn default() -> Self {
        Self { max_terms: 8192, max_magnitude: 1000.0 }
    }
}

/// Whether `x` may be computed on in f16: sums of `terms` elements, no large or non-finite value.
///
/// This evaluates `x` and waits for it, so no operation of the crate calls it; it is for a caller
/// who chooses a model's dtype once, at load time.
///
/// # Shapes
/// `x`: any.
///
/// # Errors
/// When `x` is not floating point, `terms` is negative, a limit is not a positive finite number, or
/// `x` cannot be evaluated.
///
/// # Example
/// ```
/// use mlx_primitives::config::precision::{fits_float16, Float16Limits};
/// use mlx_rs::array;
///
/// assert!(fits_float16(array!([1.0, -3.5]), 512, &Float16Limits::default())?);
/// assert!(!fits_float16(array!([1.0, 7e4]), 512, &Float16Limits::default())?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn fits_float16(x: impl AsRef<Array>, terms: i32, limits: &Float16Limits) -> Result<bool> {
    let x = x.as_ref();
    let check = Check::op("fits_float16");
    check.floating("x", x)?;
    check.positive("max_magnitude", limits.max_magnitude)?;
    check.at_least("max_terms", limits.max_terms, 1)?;
    check.at_least("terms", terms, 0)?;
    if terms > limits.max_terms {
        return Ok(false);
    }
    if x.size() == 0 {
        return Ok(true);
    }
    let largest = x.as_dtype(Dtype::Float32)?.abs()?.max(None)?;
    let largest =
        largest.try_item_cast::<f32>().map_err(|error| Exception::custom(error.to_string()))?;
    // NaN compares false, which is the answer wanted for it.
    Ok(largest <= limits.max_magnitude)
}
