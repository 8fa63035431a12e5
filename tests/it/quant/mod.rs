mod layers;
mod linear;
mod weight;

use mlx_primitives::quant::QuantizedWeight;
use mlx_rs::Dtype;

use crate::support::{sample::normal, tensor::Tensor};

/// A seeded weight whose scales have this dtype.
fn quantized(shape: [i32; 2], group_size: i32, bits: i32, dtype: Dtype) -> QuantizedWeight {
    QuantizedWeight::quantize(normal(9, &shape, dtype), group_size, bits).unwrap()
}

/// The matrix a packed weight stands for: a row is one little-endian string of bits.
fn unpacked(weight: &QuantizedWeight) -> Tensor {
    let words = weight.weight().to_vec_cast::<u32>().unwrap();
    let words_in_row = weight.weight().dim(1) as usize;
    let (scales, biases) = (Tensor::of(weight.scales()), Tensor::of(weight.biases()));
    let shape = weight.shape().map(|size| size as usize);
    Tensor::from_fn(&shape, |index| {
        let (row, column) = (index[0], index[1]);
        let q = (0..weight.bits() as usize).fold(0, |q, bit| {
            let at = column * weight.bits() as usize + bit;
            let word = words[row * words_in_row + at / 32];
            q | (((word >> (at % 32)) & 1) << bit)
        });
        let group = [row, column / weight.group_size() as usize];
        scales.at(&group) * f64::from(q) + biases.at(&group)
    })
}

/// `x · Wᵀ + b` over the rows of `x`.
fn linear(x: &Tensor, matrix: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let mut shape = x.shape.clone();
    *shape.last_mut().unwrap() = matrix.shape[0];
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let products = x.rows().flat_map(|x| {
        matrix.rows().enumerate().map(move |(o, w)| dot(x, w) + bias.map_or(0.0, |b| b.values[o]))
    });
    Tensor::new(&shape, products.collect())
}
