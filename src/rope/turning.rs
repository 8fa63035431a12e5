//! Checked options, and the rotation that needs no kernel.

use mlx_rs::{Array, Dtype, fast};

use super::{RopeFrequencies, RopeOffset, RopeOptions, RopeStyle, reference};
use crate::{
    check::{Check, axes},
    error::Result,
    layout::Layout,
};

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

    /// MLX's op, where it is right: see [`has_builtin_positions`].
    pub(super) fn builtin(&self, x: &Array, offset: RopeOffset) -> Result<Array> {
        if x.size() == 0 {
            return Ok(x.clone());
        }
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

/// Whether f32 holds every position of `steps`, and none is below zero, as far as the host can tell.
pub(super) fn has_builtin_positions(offset: RopeOffset, steps: i32) -> bool {
    match offset {
        RopeOffset::At(first) => first >= 0 && i64::from(first) + i64::from(steps) <= 1 << 24,
        RopeOffset::PerRow(_) => true,
    }
}

/// The refusal of MLX's op without [`has_builtin_positions`].
pub(super) const POSITIONS: &str = "MLX counts positions from 0 up to 2^24";
