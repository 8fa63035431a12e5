//! What a scan does, step by step and in pairs.

use mlx_rs::{
    Array, Dtype,
    ops::{logaddexp, maximum, minimum, select},
};

use super::options::ScanOperator;
use crate::{error::Result, uploads};

/// How a scan goes from one step to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// `h ← a · h + x`.
    Affine,
    /// `h ← h ∘ x`.
    Operator(ScanOperator),
}

impl Rule {
    /// The state that changes nothing, or for an affine scan zero.
    pub(super) fn nothing(self) -> f32 {
        match self {
            Self::Affine | Self::Operator(ScanOperator::Add) => 0.0,
            Self::Operator(ScanOperator::Mul) => 1.0,
            Self::Operator(ScanOperator::Max | ScanOperator::LogAddExp) => f32::NEG_INFINITY,
            Self::Operator(ScanOperator::Min) => f32::INFINITY,
        }
    }

    /// The state after `x`.
    pub(super) fn step(self, state: &Array, decay: &Array, x: &Array) -> Result<Array> {
        let Self::Operator(operator) = self else { return Ok(decay.multiply(state)?.add(x)?) };
        Ok(match operator {
            ScanOperator::Add => state.add(x)?,
            ScanOperator::Mul => state.multiply(x)?,
            ScanOperator::Max => maximum(state, x)?,
            ScanOperator::Min => minimum(state, x)?,
            ScanOperator::LogAddExp => log_add_exp(state, x)?,
        })
    }

    /// What the two steps do together: of an affine scan, decays and steps.
    pub(super) fn combine(self, first: &[Array], second: &[Array]) -> Result<Vec<Array>> {
        match (first, second) {
            ([decay, x], [next_decay, next_x]) => {
                Ok(vec![next_decay.multiply(decay)?, self.step(x, next_decay, next_x)?])
            }
            ([x, ..], [next_x, ..]) => Ok(vec![self.step(x, next_x, next_x)?]),
            _ => Ok(Vec::new()),
        }
    }
}

/// `log(exp(a) + exp(b))`, with a gradient of zero where both are −∞, where MLX's is NaN.
fn log_add_exp(a: &Array, b: &Array) -> Result<Array> {
    let (none, zero) = (uploads::float(f32::NEG_INFINITY), uploads::float(0.0));
    let nothing = maximum(a, b)?.eq(&none)?;
    let some = |array: &Array| select(&nothing, &zero, array);
    Ok(select(&nothing, &none, logaddexp(some(a)?, some(b)?)?)?)
}

/// The dtype that `dtype` is scanned in.
pub(super) fn wide(dtype: Dtype) -> Dtype {
    if dtype == Dtype::Complex64 { dtype } else { Dtype::Float32 }
}
