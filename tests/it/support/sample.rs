//! Seeded inputs, the same on every machine.

use mlx_rs::{
    Array, Dtype,
    ops::indexing::{Ellipsis, IndexOp, IntoStrideBy},
};

/// A small generator (splitmix64) whose draws do not depend on MLX or on a crate's version.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in `0..bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.unit() * bound as f64) as usize
    }

    /// Roughly normal: the sum of twelve uniforms.
    pub(crate) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

/// Roughly normal values with mean 0 and deviation 1.
pub(crate) fn normal(seed: u64, shape: &[i32], dtype: Dtype) -> Array {
    let mut random = Random::new(seed);
    let count: i32 = shape.iter().product();
    let values: Vec<_> = (0..count).map(|_| random.normal() as f32).collect();
    Array::from_slice(&values, shape).as_dtype(dtype).unwrap()
}

/// The same values behind strides: every other element of a row twice as long.
pub(crate) fn strided(array: &Array) -> Array {
    let mut shape = array.shape().to_vec();
    let last = *shape.last().unwrap();
    shape.push(1);
    let column = array.reshape(&shape).unwrap();
    let filler =
        column.multiply(Array::from_f32(f32::NAN).as_dtype(array.dtype()).unwrap()).unwrap();
    let pairs = mlx_rs::ops::concatenate(&[column, filler], -1).unwrap();
    shape.pop();
    *shape.last_mut().unwrap() = 2 * last;
    let wide = pairs.reshape(&shape).unwrap();
    wide.eval().unwrap();
    wide.index((Ellipsis, (..).stride_by(2)))
}
