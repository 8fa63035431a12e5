//! How blocks hold numbers.

use mlx_rs::{Array, Dtype, stop_gradient};

use crate::error::Result;

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

    /// Whether its numbers stand for themselves times a scale.
    pub(crate) const fn is_scaled(self) -> bool {
        !matches!(self, Self::Plain)
    }

    /// The numbers of blocks in f32, before any scale.
    pub(super) fn numbers(self, blocks: &Array) -> Result<Array> {
        Ok(match self {
            Self::Plain => blocks.as_dtype(Dtype::Float32)?,
            Self::Int8 => stop_gradient(blocks)?.as_dtype(Dtype::Float32)?,
            Self::Fp8 => stop_gradient(blocks)?.from_fp8(Dtype::Float32)?,
        })
    }
}
