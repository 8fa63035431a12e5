//! How a cache stores numbers: as they are, or in fewer bits.

use mlx_rs::{
    Array, Dtype,
    ops::{dequantize, indexing::TryIndexOp, quantize},
};

use crate::{attention::BlockForm, check::Check, error::Result, uploads};

/// How keys, or values, are stored.
///
/// Fewer bits take less memory, and less of it is read for each token; what is read is turned into numbers again for each
/// call. Keys suffer more from rounding than values do.
///
/// | form | bytes a number, of f16 | error of a number |
/// |---|---|---|
/// | `Plain` | 2 | none |
/// | `Int8` | 1 + 4 / G | half of 1/255 of the range of its group |
/// | `Int4` | 0.5 + 4 / G | half of 1/15 of the range of its group |
/// | `Fp8` | 1 + 4 / D | 1/16 of itself, down to 2^-18 of the largest of its head |
///
/// Groups are of `G` = 64 numbers of a head, or 32 where `D` is no multiple of 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum KvForm {
    /// As they come.
    #[default]
    Plain,
    /// Integers of 8 bits with a scale and a bias for each group; `D` must be a multiple of 32.
    Int8,
    /// Integers of 4 bits, likewise.
    Int4,
    /// e4m3 floats, with an f32 scale for each head of each token.
    Fp8,
}

impl KvForm {
    /// Every form there is.
    pub const ALL: &[Self] = &[Self::Plain, Self::Int8, Self::Int4, Self::Fp8];

    /// The name of the form in files.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|form| form.name() == name)
    }

    /// Refuses heads of a size that the form cannot hold.
    pub(super) fn check(self, check: Check, name: &'static str, size: i32) -> Result<()> {
        let grouped = matches!(self, Self::Int8 | Self::Int4);
        let holds = !grouped || (size > 0 && size % 32 == 0);
        check.value(holds, name, "have heads of a multiple of 32 numbers to be integers", size)
    }

    /// How many arrays hold the numbers.
    pub(super) const fn arrays(self) -> usize {
        match self {
            Self::Plain => 1,
            Self::Fp8 => 2,
            Self::Int8 | Self::Int4 => 3,
        }
    }

    /// `[B, H_kv, S, D]` as arrays of `[B, H_kv, S, _]`.
    pub(super) fn encode(self, numbers: &Array) -> Result<Vec<Array>> {
        let Some(bits) = self.bits() else {
            return if self == Self::Plain { Ok(vec![numbers.clone()]) } else { to_fp8(numbers) };
        };
        let size = numbers.dim(3);
        if numbers.size() == 0 {
            // MLX asks a row of nothing for its range.
            let part = |width: i32| numbers.try_index((.., .., .., ..width));
            let packed = part(size * bits / 32)?.as_dtype(Dtype::Uint32)?;
            let groups = part(size / group_size(size))?;
            return Ok(vec![packed, groups.clone(), groups]);
        }
        let (packed, scales, biases) = quantize(numbers, group_size(size), bits)?;
        Ok(vec![packed, scales, biases])
    }

    /// The numbers in such arrays, of `size` a head.
    pub(super) fn decode(self, arrays: &[Array], dtype: Dtype, size: i32) -> Result<Array> {
        match arrays {
            [packed, scales, biases] if packed.size() > 0 => {
                Ok(dequantize(packed, scales, biases, group_size(size), self.bits())?)
            }
            [packed, ..] if packed.size() == 0 => {
                let shape = [packed.dim(0), packed.dim(1), packed.dim(2), size];
                Ok(mlx_rs::ops::zeros_dtype(&shape, dtype)?)
            }
            [numbers, scales] => {
                BlockForm::Fp8.decode(&[numbers.clone(), scales.squeeze_axes(&[-1])?], dtype)
            }
            [numbers, ..] => Ok(numbers.clone()),
            [] => Ok(uploads::float(f32::NAN)),
        }
    }

    const fn bits(self) -> Option<i32> {
        match self {
            Self::Int8 => Some(8),
            Self::Int4 => Some(4),
            Self::Plain | Self::Fp8 => None,
        }
    }
}

const fn group_size(size: i32) -> i32 {
    if size % 64 == 0 { 64 } else { 32 }
}

fn to_fp8(numbers: &Array) -> Result<Vec<Array>> {
    let mut arrays = BlockForm::Fp8.encode(numbers)?;
    for scales in &mut arrays[1..] {
        *scales = scales.expand_dims(-1)?;
    }
    Ok(arrays)
}
