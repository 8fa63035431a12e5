//! Normalization of each head of queries and keys, then rotary position embedding.

mod kernel;

pub(crate) use kernel::KERNELS;

use mlx_rs::{Array, Dtype};

use super::{RopeOffset, RopeOptions, pair::Pair, turning::Turning};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    norm::rms_norm::{RmsNormOptions, Scaling, rms_norm},
};

/// Options of [`qk_norm_rope`].
#[derive(Debug, Clone)]
pub struct QkNormRopeOptions {
    /// Added to the mean square of a head. Default: 1e-5.
    pub eps: f32,
    /// Whether heads are scaled by `1 + weight`, as in Gemma, and not by `weight`. Default: no.
    pub unit_offset: bool,
    /// How the normalized heads are rotated; its `dispatch` is that of the whole.
    pub rope: RopeOptions,
}

impl Default for QkNormRopeOptions {
    fn default() -> Self {
        let RmsNormOptions { eps, unit_offset, .. } = RmsNormOptions::default();
        Self { eps, unit_offset, rope: RopeOptions::default() }
    }
}

/// Normalizes each head of queries and keys as [`rms_norm`](crate::norm::rms_norm()) does, each with a weight of its
/// own, then rotates it as [`rope`](super::rope()) does: attention as in Qwen 3 and Gemma 3.
///
/// `y = rope(x / sqrt(mean(x²) + eps) · weight)`, or `· (1 + weight)` with [`QkNormRopeOptions::unit_offset`], with
/// the mean over a head.
///
/// # Shapes
/// - `queries`: `[B, S, H, D]`, or `[B, H, S, D]` with [`Layout::Bhsd`](crate::Layout::Bhsd), f32, f16 or bf16; and their
///   weight, `[D]`, any of those
/// - `keys`: the same with `H_kv` heads, any number of them; the same dtype; and their weight, `[D]`
/// - `offset`: a number, or `[B]`, int32: the position where each row starts
/// - results: queries and keys, each of its shape and dtype
///
/// # Errors
/// Those of [`rope_qk`](super::rope_qk()), and when a weight is not `[D]` or not floating point, or when `eps` is
/// negative or not finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::rope::{QkNormRopeOptions, qk_norm_rope};
/// use mlx_rs::{Array, array};
///
/// let queries = Array::from_slice(&[3.0_f32, 4.0, 0.0, 2.0], &[1, 1, 2, 2]);
/// let keys = Array::from_slice(&[6.0_f32, 8.0], &[1, 1, 1, 2]);
/// let (query_weight, key_weight) = (array!([1.0, 1.0]), array!([0.0, 2.0]));
/// let options = QkNormRopeOptions { eps: 0.0, ..Default::default() };
/// let (queries, keys) = qk_norm_rope((queries, query_weight), (keys, key_weight), 0, options)?;
/// let expected = Array::from_slice(&[0.848_528_f32, 1.131_371, 0.0, 1.414_214], &[1, 1, 2, 2]);
/// assert!(queries.all_close(expected, None, None, None)?);
/// assert!(keys.all_close(Array::from_slice(&[0.0_f32, 2.262_742], &[1, 1, 1, 2]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused norm and fused rope, which round in between. `Kernel` does all four in one pass over
/// memory, and the gradients of both arrays and both weights in another; it takes heads of up to 1024 elements, and
/// `Auto` takes it for large arrays on an NVIDIA GPU. `Reference` is plain ops, which `Auto` takes on a CPU.
///
/// Henry et al., [Query-Key Normalization for Transformers](https://arxiv.org/abs/2010.04245), 2020.
pub fn qk_norm_rope<'a>(
    queries: (impl AsRef<Array>, impl AsRef<Array>),
    keys: (impl AsRef<Array>, impl AsRef<Array>),
    offset: impl Into<RopeOffset<'a>>,
    options: QkNormRopeOptions,
) -> Result<(Array, Array)> {
    let dispatch = options.rope.dispatch;
    let arrays = [queries.0.as_ref(), keys.0.as_ref()];
    let weights = [queries.1.as_ref(), keys.1.as_ref()];
    let problem = Problem::new(arrays, weights, offset.into(), options)?;
    let backend = dispatch.resolve(&problem)?;
    let Problem { pair, weights, scaling } = &problem;
    let each = |normed: &dyn Fn(&Array, &Array) -> Result<Array>| {
        // MLX's CUDA back end fails to launch anything for no rows.
        let some =
            |x: &Array, weight| if x.size() == 0 { Ok(x.clone()) } else { normed(x, weight) };
        Ok((some(pair.queries, weights[0])?, some(pair.keys, weights[1])?))
    };
    match backend {
        Backend::Builtin => each(&|x, weight| builtin(x, weight, *scaling, pair)),
        Backend::Kernel => kernel::qk_norm_rope(&problem).map(Into::into),
        Backend::Reference => {
            each(&|x, weight| reference(x, weight, *scaling, pair.offset, &pair.turning))
        }
    }
}

/// A checked call.
struct Problem<'a> {
    pair: Pair<'a>,
    weights: [&'a Array; 2],
    scaling: Scaling,
}

impl<'a> Problem<'a> {
    fn new(
        arrays: [&'a Array; 2],
        weights: [&'a Array; 2],
        offset: RopeOffset<'a>,
        options: QkNormRopeOptions,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let QkNormRopeOptions { eps, unit_offset, rope } = options;
        let pair = Pair::new(check, arrays, offset, rope)?;
        for (name, weight) in ["query weight", "key weight"].into_iter().zip(weights) {
            check.floating(name, weight)?;
            check.shape(name, weight, axes![pair.queries.dim(3)])?;
        }
        check.non_negative("eps", eps)?;
        Ok(Self { pair, weights, scaling: Scaling { eps, unit_offset } })
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "qk_norm_rope";

    fn choose(&self, context: &Context) -> Backend {
        self.pair.choose(Self::OP, self.refusal(Backend::Kernel, context), context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        let refusal = self.pair.refusal(backend, context);
        let size = self.pair.queries.dim(3);
        match backend {
            Backend::Kernel => refusal.or_else(|| kernel::refusal(size)),
            _ => refusal,
        }
    }
}

fn builtin(x: &Array, weight: &Array, scaling: Scaling, pair: &Pair) -> Result<Array> {
    pair.turning.builtin(&normed(x, weight, scaling, Backend::Builtin)?, pair.offset)
}

/// In f32 up to the result.
fn reference(
    x: &Array,
    weight: &Array,
    scaling: Scaling,
    offset: RopeOffset,
    turning: &Turning,
) -> Result<Array> {
    let wide = x.as_dtype(Dtype::Float32)?;
    let turned = turning.reference(&normed(&wide, weight, scaling, Backend::Reference)?, offset)?;
    Ok(turned.as_dtype(x.dtype())?)
}

fn normed(x: &Array, weight: &Array, scaling: Scaling, backend: Backend) -> Result<Array> {
    let Scaling { eps, unit_offset } = scaling;
    rms_norm(x, weight, RmsNormOptions { eps, unit_offset, dispatch: Dispatch::Only(backend) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Settings, dispatch::Target};

    fn choice(target: Target, size: i32) -> Option<Backend> {
        let x = Array::zeros::<f32>(&[4, 4096, 32, size]).ok()?;
        let weight = Array::zeros::<f32>(&[size]).ok()?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        let options = QkNormRopeOptions::default();
        let problem = Problem::new([&x, &x], [&weight, &weight], 0.into(), options).ok()?;
        Some(problem.choose(&context))
    }

    #[test]
    fn an_nvidia_gpu_takes_the_kernel_for_heads_it_can_hold() {
        for (target, size, expected) in [
            (Target::Cuda, 1024, Backend::Kernel),
            (Target::Cuda, 1026, Backend::Builtin),
            (Target::Metal, 128, Backend::Builtin),
            (Target::Cpu, 128, Backend::Reference),
        ] {
            assert_eq!(choice(target, size), Some(expected), "{target:?} with {size}");
        }
    }
}
