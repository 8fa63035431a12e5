//! The definition: unpack, then multiply.

use mlx_rs::{Array, Dtype};

use super::{Problem, dense};
use crate::error::Result;

pub(super) fn quantized_linear(problem: &Problem) -> Result<Array> {
    dense::multiply(&problem.weight.dequantize(Dtype::Float32)?, problem)
}
