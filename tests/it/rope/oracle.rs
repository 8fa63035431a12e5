//! The definition on f64 values, and how close each backend comes to it.

use mlx_primitives::{Backend, Layout, rope::RopeStyle};
use mlx_rs::Dtype;

use super::OP;
use crate::support::{compare::Tolerance, tensor::Tensor};

/// A rotation by the definition.
#[derive(Debug, Clone)]
pub(crate) struct Oracle {
    pub(crate) style: RopeStyle,
    pub(crate) layout: Layout,
    /// The radians each pair turns by at each position.
    pub(crate) frequencies: Vec<f64>,
    pub(crate) magnitude: f64,
    /// The first position of each row.
    pub(crate) starts: Vec<i64>,
}

/// `base^(-2i/dims)`.
pub(crate) fn frequencies(dims: i32, base: f64) -> Vec<f64> {
    (0..dims / 2).map(|pair| (-2.0 * f64::from(pair) / f64::from(dims) * base.ln()).exp()).collect()
}

impl Oracle {
    /// Interleaved or not, in BSHD, with the default base, every row from one position on.
    pub(super) fn new(style: RopeStyle, dims: i32, batch: i32, start: i32) -> Self {
        Self {
            style,
            layout: Layout::Bshd,
            frequencies: frequencies(dims, 10_000.0),
            magnitude: 1.0,
            starts: vec![start.into(); batch as usize],
        }
    }

    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        Tensor::from_fn(&x.shape, |index| {
            let element = index[3];
            let pairs = self.frequencies.len();
            if element >= 2 * pairs {
                return x.at(index);
            }
            let (pair, partner, is_first) = match self.style {
                RopeStyle::Interleaved => (element / 2, element ^ 1, element.is_multiple_of(2)),
                RopeStyle::HalfSplit => {
                    (element % pairs, (element + pairs) % (2 * pairs), element < pairs)
                }
            };
            let step = index[self.layout.sequence_axis() as usize];
            let position = self.starts[index[0]] + step as i64;
            let (sin, cos) = (position as f64 * self.frequencies[pair]).sin_cos();
            let other = x.at(&[index[0], index[1], index[2], partner]);
            let turned = if is_first { -other * sin } else { other * sin };
            self.magnitude * (x.at(index) * cos + turned)
        })
    }

    /// What `backend` may be off by on `x`.
    ///
    /// MLX's op divides a position by a period in f32: the period is rounded, its reciprocal is, and
    /// the angle is, each by 2^-24 of the angle, which is at most the position. A turned element
    /// moves by as much of the pair's length.
    pub(super) fn tolerance(&self, backend: Backend, x: &Tensor, dtype: Dtype) -> Tolerance {
        if backend != Backend::Builtin {
            return Tolerance::of(OP, dtype);
        }
        let steps = x.shape[self.layout.sequence_axis() as usize] as i64;
        let last = self.starts.iter().max().map_or(0, |start| start + steps) as f64;
        let largest = x.values.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let Tolerance { rtol, atol } = Tolerance::of("rope by MLX", dtype);
        let angle = 3.0 * 2.0_f64.powi(-24) * last;
        Tolerance { rtol, atol: atol + angle * 2.0_f64.sqrt() * largest * self.magnitude }
    }
}
