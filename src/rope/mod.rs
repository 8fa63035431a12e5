//! Rotary position embeddings.
//!
//! [`rope`](rope()) rotates one array, [`rope_qk`] queries and keys in one pass, and [`qk_norm_rope`] normalizes each head before. [`Rope`] is
//! the module. [`RopeFrequencies`] are the angles, with one of the [`RopeScaling`]s for contexts longer than those of training.

mod frequencies;
mod heads;
mod module;
mod pair;
mod qk_norm_rope;
mod reference;
mod rope_qk;
mod scaling;
mod turning;
mod yarn;

pub use frequencies::RopeFrequencies;
pub use module::{Rope, RopeBuilder, RopeInput};
pub use qk_norm_rope::{QkNormRopeOptions, qk_norm_rope};
pub use rope_qk::rope_qk;
pub use scaling::RopeScaling;
pub use yarn::{Yarn, YarnRamp};

pub(crate) use qk_norm_rope::KERNELS as QK_NORM_ROPE_KERNELS;
pub(crate) use rope_qk::KERNELS as ROPE_QK_KERNELS;

use mlx_rs::Array;

pub(crate) use self::turning::Turning;
use self::turning::check_offset;
use crate::{
    check::Check,
    dispatch::{Backend, Context, Dispatch, Dispatched, NO_KERNEL, Target},
    error::Result,
    layout::Layout,
};

/// Which two elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RopeStyle {
    /// Element `i` with element `i + dims/2`: Llama, Qwen, Mistral, Phi and most checkpoints.
    #[default]
    HalfSplit,
    /// Element `2i` with element `2i + 1`: the paper, GPT-J, and what MLX calls traditional.
    Interleaved,
}

/// The position of the first element of the sequence axis.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum RopeOffset<'a> {
    /// One for every row of the batch. Below zero, the rows are rotated backwards.
    At(i32),
    /// One for each row: `[B]`, int32, not below zero. The values are not checked, because that
    /// would wait for the device.
    PerRow(&'a Array),
}

impl From<i32> for RopeOffset<'_> {
    fn from(position: i32) -> Self {
        Self::At(position)
    }
}

impl<'a> From<&'a Array> for RopeOffset<'a> {
    fn from(positions: &'a Array) -> Self {
        Self::PerRow(positions)
    }
}

/// Options of [`rope`].
#[derive(Debug, Clone)]
pub struct RopeOptions {
    /// How many leading elements of a head are rotated; the others pass through. Even. Default: all `D`.
    pub dims: Option<i32>,
    /// Which two elements are rotated together.
    pub style: RopeStyle,
    /// Pair `i` is rotated by `base^(-2i/dims)` a position. Default: 10000.
    pub base: f32,
    /// What the pairs are rotated by instead, such as [`RopeScaling::frequencies`]; `base` then has no effect.
    pub frequencies: Option<RopeFrequencies>,
    /// The order of the axes of `x`.
    pub layout: Layout,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl RopeOptions {
    /// The default of [`RopeOptions::base`].
    pub const DEFAULT_BASE: f32 = 10_000.0;
}

impl Default for RopeOptions {
    fn default() -> Self {
        Self {
            dims: None,
            style: RopeStyle::default(),
            base: Self::DEFAULT_BASE,
            frequencies: None,
            layout: Layout::default(),
            dispatch: Dispatch::Auto,
        }
    }
}

/// Rotates pairs of elements of every head by angles that grow with the position.
///
/// [`rope_qk`] rotates queries and keys together.
///
/// At position `p` the pair `(a, b)` number `i` becomes `(a·cos θ - b·sin θ, a·sin θ + b·cos θ)` with
/// `θ = p · base^(-2i/dims)`, in f32 whatever the dtype. The product of a query and a key rotated so
/// depends on the distance between them alone.
///
/// # Shapes
/// - `x`: `[B, S, H, D]`, or `[B, H, S, D]` with [`Layout::Bhsd`]; f32, f16 or bf16
/// - `offset`: a number, or `[B]`, int32: the position where each row starts
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When `x` is not of rank 4 or not floating point, when `dims` is odd, below two or above `D`, when
/// `base` is not finite and above zero, when `frequencies` are not `dims/2` finite numbers, or when
/// an array `offset` is not `[B]` or not int32.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::rope::{RopeOptions, rope};
/// use mlx_rs::Array;
///
/// let x = Array::from_slice(&[1.0_f32, 0.0, 1.0, 0.0], &[1, 2, 1, 2]);
/// let y = rope(&x, 0, RopeOptions::default())?;
/// let expected = Array::from_slice(&[1.0_f32, 0.0, 0.540_302, 0.841_471], &[1, 2, 1, 2]);
/// assert!(y.all_close(expected, None, None, None)?);
///
/// // Each row may start at a position of its own.
/// let starts = Array::from_slice(&[1_i32], &[1]);
/// let y = rope(&x, &starts, RopeOptions::default())?;
/// let expected = Array::from_slice(&[0.540_302_f32, 0.841_471, -0.416_147, 0.909_297], &[1, 2, 1, 2]);
/// assert!(y.all_close(expected, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` is MLX's fused op, and what `Auto` takes on a GPU. It multiplies positions by
/// frequencies in f32, so an angle is off by up to 2⁻²² of the position: 0.02 at position 100 000.
/// It refuses a first position below 0 and a last one from 2²⁴ on, and on an NVIDIA GPU, which MLX's op cannot be launched
/// on then, hundreds of rows of a few pairs each. There, too, it and its gradient get copies of what has gaps or repetitions,
/// because MLX's writes the result of a split or broadcast array beyond its end or over itself. `Reference` is plain ops with
/// angles that are right to f32 rounding at every position, and what `Auto` takes on the CPU, where
/// MLX's op is a composition too, and rounds sines to the dtype of `x`. A magnitude other than one
/// costs the fused op one more pass.
///
/// Su et al., [RoFormer: Enhanced Transformer with Rotary Position
/// Embedding](https://arxiv.org/abs/2104.09864), 2021.
pub fn rope<'a>(
    x: impl AsRef<Array>,
    offset: impl Into<RopeOffset<'a>>,
    options: RopeOptions,
) -> Result<Array> {
    let dispatch = options.dispatch;
    let problem = Problem::new(x.as_ref(), offset.into(), options)?;
    match dispatch.resolve(&problem)? {
        Backend::Reference => problem.turning.reference(problem.x, problem.offset),
        _ => problem.turning.builtin(problem.x, problem.offset),
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    offset: RopeOffset<'a>,
    turning: Turning,
}

impl<'a> Problem<'a> {
    fn new(x: &'a Array, offset: RopeOffset<'a>, options: RopeOptions) -> Result<Self> {
        let check = Check::op(Self::OP);
        check.floating("x", x)?;
        check.shape("x", x, &options.layout.axes("B", "S", "H", "D"))?;
        let turning = Turning::new(check, options, x.dim(3))?;
        check_offset(check, offset, x.dim(0))?;
        Ok(Self { x, offset, turning })
    }

    fn builtin_refusal(&self, target: Target) -> Option<&'static str> {
        self.turning.builtin_refusal(self.x, self.offset, target)
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "rope";

    fn choose(&self, context: &Context) -> Backend {
        match context.target {
            Target::Metal | Target::Cuda if self.builtin_refusal(context.target).is_none() => {
                Backend::Builtin
            }
            _ => Backend::Reference,
        }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => Some(NO_KERNEL),
            Backend::Builtin => self.builtin_refusal(context.target),
            Backend::Reference => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn choice(target: Target, shape: [i32; 4], offset: RopeOffset) -> Option<Backend> {
        let x = Array::full::<f32>(&shape, Array::from_f32(0.0)).ok()?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        let problem = Problem::new(&x, offset, RopeOptions::default()).ok()?;
        Some(problem.choose(&context))
    }

    #[test]
    fn cuda_cannot_launch_mlx_for_many_rows_of_few_pairs() {
        for (target, shape, expected) in [
            (Target::Cuda, [128, 1, 4, 8], Backend::Reference),
            (Target::Cuda, [127, 1, 4, 8], Backend::Builtin),
            (Target::Cuda, [128, 1, 4, 64], Backend::Builtin),
            (Target::Metal, [128, 1, 4, 8], Backend::Builtin),
        ] {
            assert_eq!(
                choice(target, shape, RopeOffset::At(0)),
                Some(expected),
                "{target:?} {shape:?}"
            );
        }
    }

    #[test]
    fn gpus_take_the_fused_op_where_it_is_right() {
        const LAST: i32 = (1 << 24) - 3;
        let starts = Array::from_slice(&[0_i32], &[1]);
        for (target, offset, expected) in [
            (Target::Cpu, RopeOffset::At(0), Backend::Reference),
            (Target::Cpu, RopeOffset::PerRow(&starts), Backend::Reference),
            (Target::Metal, RopeOffset::At(0), Backend::Builtin),
            (Target::Cuda, RopeOffset::At(LAST), Backend::Builtin),
            (Target::Cuda, RopeOffset::At(LAST + 1), Backend::Reference),
            (Target::Cuda, RopeOffset::At(i32::MAX), Backend::Reference),
            (Target::Metal, RopeOffset::At(-1), Backend::Reference),
            (Target::Metal, RopeOffset::PerRow(&starts), Backend::Builtin),
        ] {
            assert_eq!(
                choice(target, [1, 3, 1, 4], offset),
                Some(expected),
                "{target:?} {offset:?}"
            );
        }
    }
}
