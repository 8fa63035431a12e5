//! The product with a packed weight.

mod dense;
mod reference;

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, dequantize, indexing::TryIndexOp, quantized_matmul, zeros_dtype},
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
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
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
/// `Builtin` is MLX's packed product; on an NVIDIA GPU few rows of large weights are padded to 8, and for 256 rows and more
/// the weight is unpacked to the dtype of `x` first, which takes 2 or 4 bytes a weight for the moment. `Reference` unpacks the
/// weight in f32 and multiplies, which takes 4. `Auto` takes `Builtin`, except for 16 rows and more on a
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

/// How a GPU is put to work by MLX's ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrangement {
    /// As it is.
    Packed,
    /// With rows of zeros up to [`FULL_ROWS`].
    Padded,
    /// The weight unpacked first.
    Unpacked,
}

/// From this many rows on, MLX's op for NVIDIA GPUs reads a weight once for several rows: on an H200, 8 rows by 14336x4096 in
/// 4 bits take 34 us, and 4 rows take 136.
const FULL_ROWS: i32 = 8;
/// The fewest elements of a weight that are worth the padding.
const WORTH_PADDING: usize = 1 << 23;
/// From this many rows on, it takes longer than to unpack the weight and to multiply: 256 rows 244 us, and 169 unpacked.
const ROWS_WORTH_UNPACKING_ON_CUDA: usize = 256;

fn arrange(target: Target, rows: usize, [outputs, inputs]: [i32; 2]) -> Arrangement {
    let elements = (outputs.unsigned_abs() as usize).saturating_mul(inputs.unsigned_abs() as usize);
    let few = (2..FULL_ROWS.unsigned_abs() as usize).contains(&rows);
    match target {
        Target::Cuda if few && elements >= WORTH_PADDING => Arrangement::Padded,
        Target::Cuda if rows >= ROWS_WORTH_UNPACKING_ON_CUDA => Arrangement::Unpacked,
        _ => Arrangement::Packed,
    }
}

fn builtin(problem: &Problem) -> Result<Array> {
    let target = Context::current()?.target;
    let dtype = match target {
        Target::Cpu => Dtype::Float32,
        Target::Metal | Target::Cuda => problem.dtype,
    };
    arranged(problem, dtype, arrange(target, problem.rows, problem.weight.shape()))
}

fn arranged(problem: &Problem, dtype: Dtype, arrangement: Arrangement) -> Result<Array> {
    let QuantizedWeight { weight, scales, biases, group_size, bits } = problem.weight;
    // MLX's CUDA kernel cannot take a vector.
    let x = problem.x.as_dtype(dtype)?.reshape(&[-1, problem.weight.shape()[1]])?;
    let packed = |x: &Array| quantized_matmul(x, weight, scales, biases, true, *group_size, *bits);
    let y = match arrangement {
        Arrangement::Packed => packed(&x)?,
        Arrangement::Padded => {
            let rows = x.dim(0);
            let zeros = zeros_dtype(&[FULL_ROWS - rows, x.dim(1)], dtype)?;
            packed(&concatenate(&[&x, &zeros], 0)?)?.try_index(..rows)?
        }
        Arrangement::Unpacked => {
            let [scales, biases] = [scales, biases].map(|array| array.as_dtype(dtype));
            let matrix = dequantize(weight, scales?, &biases?, *group_size, *bits)?;
            x.matmul(matrix.as_dtype(dtype)?.t())?
        }
    };
    problem.finish(&y)
}

#[cfg(test)]
mod tests {
    use mlx_rs::random::normal;

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

    #[test]
    fn an_nvidia_gpu_gets_few_rows_padded_and_many_unpacked() {
        for (rows, shape, expected) in [
            (1, [4096, 4096], Arrangement::Packed),
            (2, [4096, 4096], Arrangement::Padded),
            (7, [4096, 4096], Arrangement::Padded),
            (7, [1536, 576], Arrangement::Packed),
            (8, [4096, 4096], Arrangement::Packed),
            (255, [4096, 4096], Arrangement::Packed),
            (256, [4096, 4096], Arrangement::Unpacked),
        ] {
            assert_eq!(arrange(Target::Cuda, rows, shape), expected, "{rows} by {shape:?}");
            assert_eq!(arrange(Target::Metal, rows, shape), Arrangement::Packed);
        }
    }

    #[test]
    fn every_arrangement_gives_the_product() -> Result<()> {
        let (x, w) = (
            normal::<f32>(&[3, 64], None, None, None)?,
            normal::<f32>(&[5, 64], None, None, None)?,
        );
        let weight = QuantizedWeight::quantize(&w, 32, 4)?;
        let bias = normal::<f32>(&[5], None, None, None)?;
        let problem = Problem::new(&x, &weight, Some(&bias))?;
        let expected = x.matmul(weight.dequantize(Dtype::Float32)?.t())?.add(&bias)?;
        for arrangement in [Arrangement::Packed, Arrangement::Padded, Arrangement::Unpacked] {
            let y = arranged(&problem, Dtype::Float32, arrangement)?;
            assert!(y.all_close(&expected, 1e-5, 1e-5, None)?, "{arrangement:?}");
        }
        Ok(())
    }
}
