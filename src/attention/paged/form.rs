//! How blocks hold numbers.

use mlx_rs::{
    Array, Dtype,
    ops::{maximum, zeros},
    stop_gradient,
};

use crate::{error::Result, uploads};

/// How blocks of a pool hold keys, or values.
///
/// Fewer bits leave room for more tokens, and less is read for each; what is lost is lost for good. Keys suffer more from it
/// than values do.
///
/// | form | dtype | bytes of a head of `D` | a number is off by at most |
/// |---|---|---|---|
/// | `Plain` | that of the queries | `2 · D`, of f32 `4 · D` | nothing |
/// | `Int8` | i8 | `D + 4` | 1/254 of the largest of its head |
/// | `Fp8` | u8 | `D + 4` | 1/16 of itself, and 2^-18 of the largest of its head |
///
/// Of normally distributed numbers, in heads of 128, `Int8` is off by 0.6 % of their standard deviation and `Fp8` by 2.6 %,
/// both as a root mean square. Where one number of a head is far above the others, as in keys of some models, `Int8` loses
/// what is small beside it, and `Fp8` does not.
///
/// `Int8` is symmetric, and has one scale for a head of a token: not what [`KvForm::Int8`](crate::cache::KvForm) is, which has
/// a scale and a bias for each group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum BlockForm {
    /// As they come.
    #[default]
    Plain,
    /// Signed integers, and an f32 scale for each head of each token.
    Int8,
    /// e4m3 floats as [`to_fp8`](mlx_rs::ops::to_fp8) writes them, and scales likewise.
    Fp8,
}

impl BlockForm {
    /// Every form there is.
    pub const ALL: &[Self] = &[Self::Plain, Self::Int8, Self::Fp8];

    /// That of blocks of this dtype.
    pub(crate) const fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Int8 => Self::Int8,
            Dtype::Uint8 => Self::Fp8,
            _ => Self::Plain,
        }
    }

    /// The dtype of blocks that stand for numbers of `dtype`.
    pub(crate) const fn dtype(self, dtype: Dtype) -> Dtype {
        match self {
            Self::Plain => dtype,
            Self::Int8 => Dtype::Int8,
            Self::Fp8 => Dtype::Uint8,
        }
    }

    /// Whether its numbers stand for themselves times a scale.
    pub(crate) const fn is_scaled(self) -> bool {
        self.largest().is_some()
    }

    /// `[.., D]` as blocks hold it: numbers, `[.., D]`, and unless they are plain their scales, `[..]`.
    pub(crate) fn encode(self, numbers: &Array) -> Result<Vec<Array>> {
        let Some(largest) = self.largest() else { return Ok(vec![numbers.clone()]) };
        let numbers = numbers.as_dtype(Dtype::Float32)?;
        let range = match numbers.size() {
            // MLX has no largest of none.
            0 => zeros::<f32>(&numbers.shape()[..numbers.ndim().saturating_sub(1)])?,
            _ => numbers.abs()?.max_axis(-1, false)?,
        };
        // A head of zeros has no range.
        let scales = maximum(range.divide(uploads::float(largest))?, uploads::float(1e-30))?;
        let scaled = numbers.divide(scales.expand_dims(-1)?)?;
        let stored = match self {
            Self::Fp8 => scaled.to_fp8()?,
            Self::Int8 | Self::Plain => scaled.round(0)?.as_dtype(Dtype::Int8)?,
        };
        Ok(vec![stored, scales])
    }

    /// The numbers of dtype `dtype` in such arrays.
    pub(crate) fn decode(self, arrays: &[Array], dtype: Dtype) -> Result<Array> {
        match arrays {
            [stored, scales] => {
                let numbers = self.numbers(stored)?.multiply(scales.expand_dims(-1)?)?;
                Ok(numbers.as_dtype(dtype)?)
            }
            [numbers, ..] => Ok(numbers.clone()),
            [] => Ok(uploads::float(f32::NAN)),
        }
    }

    /// How many bytes `size` numbers of a head take, of `dtype` where they are plain.
    pub(crate) fn head_bytes(self, size: usize, dtype: Dtype) -> usize {
        match self {
            Self::Plain if dtype == Dtype::Float32 => size.saturating_mul(4),
            Self::Plain => size.saturating_mul(2),
            Self::Int8 | Self::Fp8 => size.saturating_add(size_of::<f32>()),
        }
    }

    /// The numbers of blocks in f32, before any scale.
    pub(super) fn numbers(self, blocks: &Array) -> Result<Array> {
        Ok(match self {
            Self::Plain => blocks.as_dtype(Dtype::Float32)?,
            Self::Int8 => stop_gradient(blocks)?.as_dtype(Dtype::Float32)?,
            Self::Fp8 => stop_gradient(blocks)?.from_fp8(Dtype::Float32)?,
        })
    }

    /// What the largest number of a head is stored as.
    const fn largest(self) -> Option<f32> {
        match self {
            Self::Plain => None,
            Self::Int8 => Some(127.0),
            Self::Fp8 => Some(448.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_nothing_are_held_too() -> Result<()> {
        let nothing = Array::zeros::<f32>(&[2, 3, 0])?;
        for &form in BlockForm::ALL {
            let held = form.encode(&nothing)?;
            assert_eq!(held[0].shape(), [2, 3, 0], "{form:?}");
            assert!(held.get(1).is_none_or(|scales| scales.shape() == [2, 3]), "{form:?}");
            assert_eq!(form.decode(&held, Dtype::Float32)?.shape(), [2, 3, 0], "{form:?}");
        }
        Ok(())
    }
}
