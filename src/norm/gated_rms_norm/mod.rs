//! Gated root-mean-square normalization.

mod kernel;
mod module;
mod reference;

pub(crate) use kernel::KERNELS;
pub use module::{GatedRmsNorm, GatedRmsNormBuilder, GatedRmsNormInput};

use mlx_rs::{Array, Dtype, ops::sigmoid};

use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    kernel::Rows,
};

/// When the gate of [`gated_rms_norm`] is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GateOrder {
    /// First gate, then normalize: `rms_norm(x · silu(gate)) · weight`, as in Mamba-2 (`norm_before_gate=False`).
    #[default]
    GateThenNorm,
    /// First normalize, then gate: `rms_norm(x) · weight · silu(gate)`, as in gated delta nets (`norm_before_gate=True`).
    NormThenGate,
}

/// Options of [`gated_rms_norm`].
#[derive(Debug, Clone)]
pub struct GatedRmsNormOptions {
    /// Added to the mean square, so that a group of zeros stays finite. Default: 1e-5.
    pub eps: f32,
    /// When the gate is applied. Default: before the norm.
    pub order: GateOrder,
    /// How many neighbours of the last axis are normalized together. Default: all.
    pub group_size: Option<i32>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl GatedRmsNormOptions {
    /// The default of [`GatedRmsNormOptions::eps`].
    pub const DEFAULT_EPS: f32 = 1e-5;
}

impl Default for GatedRmsNormOptions {
    fn default() -> Self {
        Self {
            eps: Self::DEFAULT_EPS,
            order: GateOrder::default(),
            group_size: None,
            dispatch: Dispatch::Auto,
        }
    }
}

/// Scales each row of `x` to a root mean square of one, then by `weight`, and gates it by `silu(gate)` before or after.
///
/// `y = u / sqrt(mean(u²) + eps) · weight` with `u = x · silu(gate)`, or
/// `y = x / sqrt(mean(x²) + eps) · weight · silu(gate)` with [`GateOrder::NormThenGate`]. The mean is over the last axis,
/// or over each [`GatedRmsNormOptions::group_size`] elements of it. All is computed in f32 whatever the dtype, and
/// rounded once.
///
/// # Shapes
/// - `x`, `gate`: `[..., D]`, of one shape and dtype: f32, f16 or bf16
/// - `weight`: `[D]`, any of those
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When `x` has no last axis or an empty one, when `gate` differs from `x` in shape or dtype, when `weight` is not `[D]`,
/// when any is not floating point, when `group_size` is below one or does not divide `D`, or when `eps` is negative or not
/// finite.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::norm::{GateOrder, GatedRmsNormOptions, gated_rms_norm};
/// use mlx_rs::array;
///
/// let (x, gate) = (array!([[3.0, 4.0]]), array!([[0.0, 50.0]]));
/// let options =
///     GatedRmsNormOptions { order: GateOrder::NormThenGate, eps: 0.0, ..Default::default() };
/// let y = gated_rms_norm(&x, &gate, &array!([1.0, 1.0]), options)?;
/// assert!(y.all_close(array!([[0.0, 56.568_54]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Builtin` gates by plain ops around MLX's fused norm. `Kernel` does all in one pass over memory, and its gradient in
/// another; `Auto` takes it for large arrays on an NVIDIA GPU. `Reference` is plain ops.
///
/// Dao and Gu, [Transformers are SSMs](https://arxiv.org/abs/2405.21060), 2024; Yang, Kautz and Hatamizadeh,
/// [Gated Delta Networks](https://arxiv.org/abs/2412.06464), 2024.
pub fn gated_rms_norm(
    x: impl AsRef<Array>,
    gate: impl AsRef<Array>,
    weight: impl AsRef<Array>,
    options: GatedRmsNormOptions,
) -> Result<Array> {
    let problem = Problem::new(x.as_ref(), gate.as_ref(), weight.as_ref(), &options)?;
    match options.dispatch.resolve(&problem)? {
        // MLX's CUDA back end fails to launch anything for no rows.
        _ if problem.x.size() == 0 => Ok(problem.x.clone()),
        Backend::Builtin => builtin(&problem),
        Backend::Kernel => kernel::gated_rms_norm(&problem),
        Backend::Reference => {
            reference::gated_rms_norm(problem.x, problem.gate, problem.weight, problem.norm)
        }
    }
}

/// A checked call.
struct Problem<'a> {
    x: &'a Array,
    gate: &'a Array,
    weight: &'a Array,
    norm: Norm,
}

/// How rows are normalized and gated.
#[derive(Debug, Clone, Copy)]
struct Norm {
    eps: f32,
    order: GateOrder,
    /// Groups of a row, and elements of a group.
    groups: [i32; 2],
}

impl Norm {
    /// `array`, `[..., D]`, with its last axis split into groups.
    fn split(self, array: &Array) -> Result<Array> {
        let leading = array.shape().split_last().map_or(&[][..], |(_, leading)| leading);
        Ok(array.reshape(&[leading, &self.groups].concat())?)
    }
}

impl<'a> Problem<'a> {
    fn new(
        x: &'a Array,
        gate: &'a Array,
        weight: &'a Array,
        options: &GatedRmsNormOptions,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("x", x)?;
        let dims = check.last_axis("x", x)?;
        check.same_shape("gate", gate, x)?;
        check.dtype_among("gate", gate, &[dtype])?;
        check.floating("weight", weight)?;
        check.shape("weight", weight, axes![dims])?;
        check.non_negative("eps", options.eps)?;
        let size = options.group_size.unwrap_or(dims);
        let divides = size >= 1 && dims % size == 0;
        check.value(divides, "group_size", format_args!("divide {dims}"), size)?;
        let norm = Norm { eps: options.eps, order: options.order, groups: [dims / size, size] };
        Ok(Self { x, gate, weight, norm })
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "gated_rms_norm";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = context.kernel_wins(Self::OP, self.x.size())
            && self.refusal(Backend::Kernel, context).is_none()
            && kernel::suits(self);
        if kernel { Backend::Kernel } else { Backend::Builtin }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => context
                .obstacle
                .or_else(|| Rows::refusal(self.x))
                .or_else(|| kernel::refusal_of_groups(self.norm)),
            _ => None,
        }
    }
}

/// `silu(gate)`, in f32.
fn silu(gate: &Array) -> Result<Array> {
    let gate = gate.as_dtype(Dtype::Float32)?;
    Ok(gate.multiply(sigmoid(&gate)?)?)
}

fn builtin(problem: &Problem) -> Result<Array> {
    let Problem { x, weight, norm, .. } = problem;
    let (wide, gate) = (x.as_dtype(Dtype::Float32)?, silu(problem.gate)?);
    let normalize = |x: &Array| -> Result<Array> {
        let y = mlx_rs::fast::rms_norm(norm.split(x)?, None, norm.eps)?;
        Ok(y.reshape(x.shape())?.multiply(weight.as_dtype(Dtype::Float32)?)?)
    };
    let y = match norm.order {
        GateOrder::GateThenNorm => normalize(&wide.multiply(gate)?)?,
        GateOrder::NormThenGate => normalize(&wide)?.multiply(gate)?,
    };
    Ok(y.as_dtype(x.dtype())?)
}
