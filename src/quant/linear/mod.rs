//! The product with a packed weight.

mod dense;
mod reference;

use mlx_rs::{
    Array, Dtype,
    ops::{quantized_matmul, zeros_dtype},
};

use super::QuantizedWeight;
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched, Target},
    error::Result,
};

/// Options of [`quantized_linear`].
#[derive(Debug, Clone, Default)]
pub struct QuantizedLinearOptions {
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// Multiplies by a packed weight: `y = x · Wᵀ + b`.
///
/// Differentiable in `x` and `bias`; the weight is data.
///
/// # Shapes
/// - `x`: `[..., I]`, f32, f16 or bf16
/// - `weight`: `[O, I]`
/// - `bias`: `[O]`, any of those; without one, nothing is added
/// - result: `[..., O]` in the dtype of `x`
///
/// # Errors
/// When the last axis of `x` is not `I`, when `bias` is not `[O]`, or when either is not floating
/// point.
///
/// # Example
/// ```
/// use mlx_primitives::quant::{QuantizedLinearOptions, QuantizedWeight, quantized_linear};
/// use mlx_rs::Array;
///
/// let weight = QuantizedWeight::quantize(&Array::ones::<f32>(&[8, 64])?, 32, 4)?;
/// let x = Array::ones::<f32>(&[2, 64])?;
/// let y = quantized_linear(&x, &weight, None, QuantizedLinearOptions::default())?;
/// assert!(y.all_close(Array::from_f32(64.0), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's packed product. `Reference` unpacks the weight in f32 and multiplies, which
/// takes 4 bytes a weight for the moment. `Auto` takes `Builtin`, except for 16 rows and more on a
/// CPU, where MLX's packed loop costs more than unpacking. On a CPU both compute in f32 whatever
/// the dtype: MLX would sum halves in halves.
pub fn quantized_linear<'a>(
    x: impl AsRef<Array>,
    weight: &QuantizedWeight,
    bias: impl Into<Option<&'a Array>>,
    options: QuantizedLinearOptions,
) -> Result<Array> {
    let problem = Problem::new(x.as_ref(), weight, bias.into())?;
    let backend = options.dispatch.resolve(&problem)?;
    match backend {
        _ if problem.rows == 0 => problem.empty(),
        Backend::Reference => reference::quantized_linear(&problem),
        _ => builtin(&problem),
    }
}

/// [`quantized_linear`] with `matrix`, which is `weight` unpacked.
pub(super) fn linear_dense(
    matrix: &Array,
    x: &Array,
    weight: &QuantizedWeight,
    bias: Option<&Array>,
) -> Result<Array> {
    let problem = Problem::new(x, weight, bias)?;
    if problem.rows == 0 { problem.empty() } else { dense::multiply(matrix, &problem) }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    weight: &'a QuantizedWeight,
    bias: Option<&'a Array>,
    dtype: Dtype,
    /// How many vectors `x` holds.
    rows: usize,
}

impl<'a> Problem<'a> {
    fn new(x: &'a Array, weight: &'a QuantizedWeight, bias: Option<&'a Array>) -> Result<Self> {
        let check = Check::op(Self::OP);
        let [outputs, inputs] = weight.shape();
        let dtype = check.floating("x", x)?;
        check.last_axis_is("x", x, inputs)?;
        if let Some(bias) = bias {
            check.floating("bias", bias)?;
            check.shape("bias", bias, axes![outputs])?;
        }
        Ok(Self { x, weight, bias, dtype, rows: x.size() / inputs as usize })
    }

    /// `[..., O]`.
    fn result_shape(&self) -> Vec<i32> {
        let (_, leading) = self.x.shape().split_last().unwrap_or((&0, &[]));
        [leading, &self.weight.shape()[..1]].concat()
    }

    fn empty(&self) -> Result<Array> {
        Ok(zeros_dtype(&self.result_shape(), self.dtype)?)
    }

    /// The product `y`, of any shape and dtype, made the result.
    fn finish(&self, y: &Array) -> Result<Array> {
        let y = y.reshape(&self.result_shape())?;
        let y = match self.bias {
            Some(bias) => y.add(bias.as_dtype(y.dtype())?)?,
            None => y,
        };
        Ok(y.as_dtype(self.dtype)?)
    }
}

/// From this many rows on, a CPU unpacks a weight sooner than it multiplies by it packed.
const ROWS_WORTH_UNPACKING: usize = 16;

impl Dispatched for Problem<'_> {
    const OP: &'static str = "quantized_linear";

    fn choose(&self, context: &Context) -> Backend {
        match context.target {
            Target::Cpu if self.rows >= ROWS_WORTH_UNPACKING => Backend::Reference,
            _ => Backend::Builtin,
        }
    }
}

fn builtin(problem: &Problem) -> Result<Array> {
    let QuantizedWeight { weight, scales, biases, group_size, bits } = problem.weight;
    let dtype = match Context::current()?.target {
        Target::Cpu => Dtype::Float32,
        Target::Metal | Target::Cuda => problem.dtype,
    };
    // MLX's CUDA kernel cannot take a vector.
    let x = problem.x.as_dtype(dtype)?.reshape(&[-1, problem.weight.shape()[1]])?;
    let y = quantized_matmul(x, weight, scales, biases, true, *group_size, *bits)?;
    problem.finish(&y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn many_rows_on_a_cpu_are_worth_unpacking_for() -> Result<()> {
        let weight = QuantizedWeight::quantize(&Array::zeros::<f32>(&[2, 32])?, 32, 4)?;
        let choice = |rows, target| {
            let x = Array::zeros::<f32>(&[rows, 32])?;
            let context = Context { target, obstacle: None, settings: Settings::default() };
            Ok::<_, crate::Error>(Problem::new(&x, &weight, None)?.choose(&context))
        };
        assert_eq!(choice(15, Target::Cpu)?, Backend::Builtin);
        assert_eq!(choice(16, Target::Cpu)?, Backend::Reference);
        assert_eq!(choice(4096, Target::Metal)?, Backend::Builtin);
        assert_eq!(choice(4096, Target::Cuda)?, Backend::Builtin);
        Ok(())
    }
}
