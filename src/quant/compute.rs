//! Whether a quantized layer multiplies packed or unpacked.

use mlx_rs::{Array, Dtype};

use super::{
    QuantizedWeight,
    linear::{self, QuantizedLinearOptions, quantized_linear},
};
use crate::{
    check::Check,
    dispatch::{Context, Target},
    error::Result,
};

/// What a quantized layer multiplies with.
///
/// # The cost of `Dense`
/// The copy takes 4 bytes a weight in f32 (2 in f16 or bf16), beside the `bits / 8` of the packed
/// weight and the two scales' share, `4 / G` bytes in f16: 4-bit groups of 64 grow from 0.5625
/// bytes a weight to 4.5625, eight times as much. `nbytes` of the layer says what it comes to.
///
/// The copy is made by the first call, is no parameter, and is made anew once the parameters were
/// lent out for writing, as loading, an optimizer's step and `value_and_grad` do: to fine-tune
/// something around a quantized layer on a CPU, leave it `Packed` if that hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum QuantizedCompute {
    /// `Dense` on a CPU, `Packed` on a GPU, settled when the layer is built.
    #[default]
    Auto,
    /// The packed weight, through [`quantized_linear`]: nothing is kept beside it. Right on a GPU,
    /// whose kernels unpack as they multiply; MLX's CPU loop is several times slower than BLAS.
    Packed,
    /// An unpacked copy kept beside the packed weight, through the device's dense product.
    Dense,
}

impl QuantizedCompute {
    /// What this comes to in `context`; never `Auto`.
    #[must_use]
    pub fn resolve(self, context: &Context) -> Self {
        match (self, context.target) {
            (Self::Auto, Target::Cpu) => Self::Dense,
            (Self::Auto, Target::Metal | Target::Cuda) => Self::Packed,
            (settled, _) => settled,
        }
    }
}

/// The product of one layer, and the copy it keeps for that.
#[derive(Debug, Clone)]
pub(super) struct Multiplier {
    compute: QuantizedCompute,
    dtype: Dtype,
    copy: Option<DenseCopy>,
}

#[derive(Debug, Clone)]
struct DenseCopy {
    matrix: Array,
    /// The loans of the parameters when the copy was made.
    loans: u64,
}

impl Multiplier {
    pub(super) fn new(check: Check, compute: QuantizedCompute, dtype: Dtype) -> Result<Self> {
        check.floating_dtype("dense_dtype", dtype)?;
        Ok(Self { compute: compute.resolve(&Context::current()?), dtype, copy: None })
    }

    pub(super) fn compute(&self) -> QuantizedCompute {
        self.compute
    }

    /// What it multiplies with, and in which dtype if unpacked.
    pub(super) fn way(&self) -> (QuantizedCompute, Dtype) {
        (self.compute, self.dtype)
    }

    /// `x · Wᵀ (+ b)`, where `loans` tells one state of the layer's parameters from another.
    pub(super) fn linear(
        &mut self,
        x: &Array,
        weight: &QuantizedWeight,
        loans: u64,
        bias: Option<&Array>,
    ) -> Result<Array> {
        match self.dense(weight, loans)? {
            Some(matrix) => linear::linear_dense(matrix, x, weight, bias),
            None => quantized_linear(x, weight, bias, QuantizedLinearOptions::default()),
        }
    }

    /// The copy, made now if there is none of these parameters; none where none is kept.
    pub(super) fn dense(&mut self, weight: &QuantizedWeight, loans: u64) -> Result<Option<&Array>> {
        if self.compute != QuantizedCompute::Dense {
            return Ok(None);
        }
        if self.copy.as_ref().is_none_or(|copy| copy.loans != loans) {
            let matrix = weight.dequantize(self.dtype)?;
            self.copy = Some(DenseCopy { matrix, loans });
        }
        Ok(self.copy.as_ref().map(|copy| &copy.matrix))
    }

    /// The bytes of the copy, made already or not.
    pub(super) fn nbytes(&self, shape: [i32; 2]) -> usize {
        let kept = self.compute == QuantizedCompute::Dense;
        let elements = if kept { shape.map(|size| size as usize).iter().product() } else { 0 };
        elements * if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::{QuantizedCompute::*, *};
    use crate::config::Settings;

    #[test]
    fn auto_is_dense_on_a_cpu_and_packed_on_a_gpu() {
        let table = [
            (Auto, Target::Cpu, Dense),
            (Auto, Target::Metal, Packed),
            (Auto, Target::Cuda, Packed),
            (Packed, Target::Cpu, Packed),
            (Dense, Target::Metal, Dense),
        ];
        for (asked, target, expected) in table {
            let context = Context { target, obstacle: None, settings: Settings::default() };
            assert_eq!(asked.resolve(&context), expected, "{asked:?} on {target:?}");
        }
    }
}
