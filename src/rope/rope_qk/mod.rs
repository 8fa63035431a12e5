//! Rotary position embedding of queries and keys at once.

mod kernel;

pub(crate) use kernel::KERNELS;

use mlx_rs::Array;

use super::{RopeOffset, RopeOptions, pair::Pair};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatched},
    error::Result,
};

/// Rotates the queries and the keys of the same tokens as [`rope`](super::rope()) does each.
///
/// # Shapes
/// - `queries`: `[B, S, H, D]`, or `[B, H, S, D]` with [`Layout::Bhsd`](crate::Layout::Bhsd); f32, f16 or bf16
/// - `keys`: the same with `H_kv` heads, any number of them; the same dtype
/// - `offset`: a number, or `[B]`, int32: the position where each row starts
/// - results: queries and keys, each of its shape and dtype
///
/// # Errors
/// Those of [`rope`](super::rope()) for either, and when the two differ in dtype or in an axis but that of heads.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::rope::{RopeOptions, rope, rope_qk};
/// use mlx_rs::Array;
///
/// let (queries, keys) = (Array::ones::<f32>(&[1, 10, 8, 64])?, Array::ones::<f32>(&[1, 10, 2, 64])?);
/// let (rotated, rotated_keys) = rope_qk(&queries, &keys, 100, RopeOptions::default())?;
/// assert_eq!(rotated_keys.shape(), [1, 10, 2, 64]);
/// let alone = rope(&queries, 100, RopeOptions::default())?;
/// assert!(rotated.all_close(alone, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Kernel` rotates both in one pass over memory, with sines and cosines computed once for all heads of a token, and its
/// gradient too; its angles are right to f32 rounding at every position, above 2²⁴ and below 0 too. `Auto` takes it
/// for large arrays on an NVIDIA GPU. It is fastest on arrays that lie in memory in the order of the layout; others it copies.
/// `Builtin` and `Reference` are those of [`rope`](super::rope()), twice, and what `Auto` takes elsewhere is what it
/// takes there.
pub fn rope_qk<'a>(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    offset: impl Into<RopeOffset<'a>>,
    options: RopeOptions,
) -> Result<(Array, Array)> {
    let dispatch = options.dispatch;
    let problem = Problem::new(queries.as_ref(), keys.as_ref(), offset.into(), options)?;
    let backend = dispatch.resolve(&problem)?;
    let Pair { queries, keys, offset, turning } = &problem.0;
    let each = |turned: &dyn Fn(&Array) -> Result<Array>| Ok((turned(queries)?, turned(keys)?));
    match backend {
        Backend::Builtin => each(&|x| turning.builtin(x, *offset)),
        Backend::Kernel => kernel::rope_qk(&problem.0).map(Into::into),
        Backend::Reference => each(&|x| turning.reference(x, *offset)),
    }
}

/// A checked call.
struct Problem<'a>(Pair<'a>);

impl<'a> Problem<'a> {
    fn new(
        queries: &'a Array,
        keys: &'a Array,
        offset: RopeOffset<'a>,
        options: RopeOptions,
    ) -> Result<Self> {
        Pair::new(Check::op(Self::OP), [queries, keys], offset, options).map(Self)
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "rope_qk";

    fn choose(&self, context: &Context) -> Backend {
        self.0.choose(Self::OP, self.refusal(Backend::Kernel, context), context)
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        self.0.refusal(backend, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Settings, dispatch::Target};

    fn choice(target: Target, rows: i32, offset: i32) -> Option<Backend> {
        let x = Array::zeros::<f32>(&[1, rows, 32, 128]).ok()?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        let problem = Problem::new(&x, &x, offset.into(), RopeOptions::default()).ok()?;
        Some(problem.choose(&context))
    }

    #[test]
    fn an_nvidia_gpu_takes_the_kernel_where_it_was_measured_to_win() {
        for (target, rows, offset, expected) in [
            (Target::Cuda, 16384, 0, Backend::Kernel),
            (Target::Cuda, 16384, -1, Backend::Kernel),
            (Target::Cuda, 1, 0, Backend::Builtin),
            (Target::Metal, 16384, 0, Backend::Builtin),
            (Target::Metal, 16384, -1, Backend::Reference),
            (Target::Cpu, 16384, 0, Backend::Reference),
        ] {
            let chosen = choice(target, rows, offset);
            assert_eq!(chosen, Some(expected), "{target:?}, {rows} rows from {offset}");
        }
    }
}
