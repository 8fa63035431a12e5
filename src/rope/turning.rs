//! Checked options, and the rotation that needs no kernel.

use mlx_rs::{Array, Dtype, fast, ops::zeros_like, stop_gradient};

use super::{RopeFrequencies, RopeOffset, RopeOptions, RopeStyle, reference};
use crate::{
    check::{Check, axes},
    dispatch::Target,
    error::Result,
    kernel::{Constant, Launch, differentiable},
    layout::Layout,
    uploads,
};

/// How heads turn.
#[derive(Debug, Clone)]
pub(crate) struct Turning {
    pub(super) dims: i32,
    pub(super) style: RopeStyle,
    pub(crate) frequencies: RopeFrequencies,
    pub(super) layout: Layout,
}

impl Turning {
    /// For heads of `size` elements.
    pub(crate) fn new(check: Check, options: RopeOptions, size: i32) -> Result<Self> {
        let dims = options.dims.unwrap_or(size);
        check_dims(check, dims)?;
        check.value(dims <= size, "dims", format_args!("be at most D = {size}"), dims)?;
        check.positive("base", options.base)?;
        let frequencies =
            options.frequencies.unwrap_or_else(|| RopeFrequencies::of_base(dims, options.base));
        frequencies.check(check, dims)?;
        Ok(Self { dims, style: options.style, frequencies, layout: options.layout })
    }

    /// `DIMS`, `INTERLEAVED` and `MAGNITUDE` of a kernel that turns.
    pub(crate) fn constants(&self) -> [Constant; 3] {
        [
            Constant::Int(self.dims),
            Constant::Bool(self.style == RopeStyle::Interleaved),
            Constant::Float(self.frequencies.magnitude as f32),
        ]
    }

    /// MLX's op, where it is right: see [`Self::builtin_refusal`].
    pub(super) fn builtin(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        if x.size() == 0 {
            return Ok(x.clone());
        }
        match Target::current()? {
            Target::Cpu | Target::Metal => self.fused(x, offset),
            Target::Cuda => self.fused_without_gaps(x, offset),
        }
    }

    /// MLX's op on an NVIDIA GPU lays its result out as its input lies, and its gradient as what comes back: it writes beyond
    /// the end for a part of a split array, and over itself for a broadcast one. So both get copies of these.
    fn fused_without_gaps(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        let (forward, backward, reference) = (self.clone(), self.backwards(), self.clone());
        let [turned] = match offset {
            RopeOffset::At(first) => differentiable(
                [x],
                move |[x]| Ok([forward.fused(&x.contiguous()?, first.into())?]),
                move |vjp| Ok([backward.fused(&vjp.cotangents[0].contiguous()?, first.into())?]),
                move |[x]| Ok([reference.reference(x, first.into())?]),
            )?,
            RopeOffset::PerRow(firsts) => differentiable(
                [x, firsts],
                move |[x, firsts]| Ok([forward.fused(&x.contiguous()?, firsts.into())?]),
                move |vjp| {
                    let ([dy], [_, firsts]) = (vjp.cotangents, vjp.inputs);
                    let dx = backward.fused(&dy.contiguous()?, firsts.into())?;
                    Ok([dx, zeros_like(firsts)?])
                },
                move |[x, firsts]| {
                    let firsts = stop_gradient(firsts)?;
                    Ok([reference.reference(x, (&firsts).into())?])
                },
            )?,
        };
        Ok(turned)
    }

    fn fused(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        let heads = self.layout.swap_with_bhsd(x)?;
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
        let factors =
            (0..turned.dim(3)).map(|index| if index < self.dims { magnitude } else { 1.0 });
        let magnified = turned.multiply(uploads::floats(factors))?;
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
    use std::slice::from_ref;

    use mlx_rs::{error::Exception, random::normal, transforms::fallible_vjp};

    use super::*;

    /// Where the op is right as it is, what goes around its fault says the same, forward and back.
    #[test]
    fn without_gaps_is_the_same_turn() -> Result<()> {
        let x = normal::<f32>(&[2, 3, 4, 6], None, None, None)?;
        let dy = normal::<f32>(&[2, 3, 4, 6], None, None, None)?;
        let firsts = Array::from_slice(&[5_i32, 0], &[2]);
        let mut frequencies = RopeFrequencies::of_base(4, 100.0);
        frequencies.magnitude = 1.25;
        let options =
            RopeOptions { dims: Some(4), frequencies: Some(frequencies), ..Default::default() };
        let turning = Turning::new(Check::op("rope"), options, 6)?;
        for offset in [RopeOffset::At(7), RopeOffset::PerRow(&firsts)] {
            type Turn = fn(&Turning, &Array, RopeOffset) -> Result<Array>;
            let with_gradient = |turn: Turn| {
                let run = |x: &[Array]| Ok::<_, Exception>(vec![turn(&turning, &x[0], offset)?]);
                fallible_vjp(run, from_ref(&x), from_ref(&dy))
            };
            let (turned, gradient) = with_gradient(Turning::fused_without_gaps)?;
            let (expected, expected_gradient) = with_gradient(Turning::fused)?;
            assert!(turned[0].all_close(&expected[0], 1e-5, 1e-5, None)?, "{offset:?}");
            assert!(gradient[0].all_close(&expected_gradient[0], 1e-5, 1e-5, None)?, "{offset:?}");
        }
        Ok(())
    }

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
