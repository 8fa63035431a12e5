//! Checked options, and the rotation that needs no kernel.

use mlx_rs::{Array, Dtype, fast};

use super::{RopeFrequencies, RopeOffset, RopeOptions, RopeStyle, reference};
use crate::{
    check::{Check, axes},
    dispatch::{Context, Target},
    error::Result,
    kernel::Launch,
    layout::Layout,
};

/// `x` as it is, and on an NVIDIA GPU without gaps and repetitions: MLX's op there lays its result out as `x` lies, so that it
/// writes beyond the end of what it has for a part of a split array, and over itself for a broadcast one.
fn side_by_side(x: &Array) -> Result<Array> {
    match Context::current()?.target {
        Target::Cuda => Ok(x.contiguous()?),
        Target::Cpu | Target::Metal => Ok(x.clone()),
    }
}

/// How heads turn.
#[derive(Debug, Clone)]
pub(super) struct Turning {
    pub(super) dims: i32,
    pub(super) style: RopeStyle,
    pub(super) frequencies: RopeFrequencies,
    pub(super) layout: Layout,
}

impl Turning {
    /// For heads of `size` elements.
    pub(super) fn new(check: Check, options: RopeOptions, size: i32) -> Result<Self> {
        let dims = options.dims.unwrap_or(size);
        check_dims(check, dims)?;
        check.value(dims <= size, "dims", format_args!("be at most D = {size}"), dims)?;
        check.positive("base", options.base)?;
        let frequencies =
            options.frequencies.unwrap_or_else(|| RopeFrequencies::of_base(dims, options.base));
        frequencies.check(check, dims)?;
        Ok(Self { dims, style: options.style, frequencies, layout: options.layout })
    }

    /// MLX's op, where it is right: see [`Self::builtin_refusal`].
    pub(super) fn builtin(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        if x.size() == 0 {
            return Ok(x.clone());
        }
        let heads = self.layout.swap_with_bhsd(&side_by_side(x)?)?;
        let interleaved = self.style == RopeStyle::Interleaved;
        let periods = self.frequencies.periods();
        let turned = match offset {
            RopeOffset::At(first) => {
                fast::rope(heads, self.dims, interleaved, None, 1.0, first, &periods)
            }
            RopeOffset::PerRow(firsts) => {
                fast::rope_dynamic(heads, self.dims, interleaved, None, 1.0, firsts, &periods)
            }
        }?;
        Ok(self.layout.swap_with_bhsd(&self.magnify(turned)?)?)
    }

    /// Why MLX's op would not turn `x` right, as far as the host can tell.
    pub(super) fn builtin_refusal(
        &self,
        x: &Array,
        offset: RopeOffset,
        target: Target,
    ) -> Option<&'static str> {
        let [batch, steps, heads, _] = self.layout.dims(x);
        let counted = match offset {
            RopeOffset::At(first) => first >= 0 && i64::from(first) + i64::from(steps) <= 1 << 24,
            RopeOffset::PerRow(_) => true,
        };
        // A thread turns the same pair of four heads.
        let depth = block_depth([self.dims / 2, steps, batch.saturating_mul((heads + 3) / 4)]);
        let launched = target != Target::Cuda || depth <= Launch::MAX_GROUP_DEPTH;
        match (counted, launched) {
            (false, _) => Some("MLX counts positions from 0 up to 2^24"),
            (_, false) => {
                Some("MLX's blocks for so many rows of so few pairs are too deep for CUDA")
            }
            _ => None,
        }
    }

    /// The definition.
    pub(super) fn reference(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        if x.size() == 0 {
            return Ok(x.clone());
        }
        let turned = reference::rope(&self.layout.swap_with_bhsd(x)?, offset, self)?;
        Ok(self.layout.swap_with_bhsd(&turned)?)
    }

    /// By the opposite angles: the transpose, and so what a gradient turns by.
    pub(super) fn backwards(&self) -> Self {
        let frequencies = self.frequencies.clone().map(|_, frequency| -frequency);
        Self { frequencies, ..self.clone() }
    }

    /// Multiplies the elements that turned by the magnitude.
    fn magnify(&self, turned: Array) -> Result<Array> {
        let magnitude = self.frequencies.magnitude as f32;
        if magnitude == 1.0 {
            return Ok(turned);
        }
        let size = turned.dim(3);
        let factors: Vec<_> =
            (0..size).map(|index| if index < self.dims { magnitude } else { 1.0 }).collect();
        let magnified = turned.multiply(Array::from_slice(&factors, &[size]))?;
        Ok(magnified.as_dtype(turned.dtype())?)
    }
}

/// `dims` elements make up pairs.
pub(super) fn check_dims(check: Check, dims: i32) -> Result<()> {
    check.at_least("dims", dims, 2)?;
    check.value(dims % 2 == 0, "dims", "be even", dims)
}

/// An array of first positions has one for each row of the batch.
pub(super) fn check_offset(check: Check, offset: RopeOffset, batch: i32) -> Result<()> {
    let RopeOffset::PerRow(positions) = offset else { return Ok(()) };
    check.dtype_among("offset", positions, &[Dtype::Int32])?;
    check.shape("offset", positions, axes![batch])
}

/// How deep a block MLX launches on an NVIDIA GPU for a grid of this size: the axes double in turn, up to 1024 threads.
fn block_depth(grid: [i32; 3]) -> u32 {
    let mut block = [1_u32; 3];
    for axis in (0..3).cycle().take(30) {
        let grows = grid[axis].unsigned_abs() >= 2 * block[axis];
        if grows && block.iter().product::<u32>() < Launch::MAX_GROUP {
            block[axis] *= 2;
        }
    }
    block[2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_deep_as_mlx_makes_them() {
        for (grid, depth) in [
            ([4, 1, 63], 32),
            ([4, 1, 64], 64),
            ([4, 1, 128], 128),
            ([8, 1, 4096], 128),
            ([16, 1, 4096], 64),
            ([32, 1, 4096], 32),
            ([1, 1, 4096], 1024),
            ([4, 4096, 128], 16),
        ] {
            assert_eq!(block_depth(grid), depth, "{grid:?}");
        }
    }
}
