//! The scan of Mamba: a diagonal linear recurrence whose every step depends on its input.

mod kernel;
mod problem;
mod reference;

pub(crate) use kernel::KERNELS;

use mlx_rs::Array;

use self::problem::{Given, Problem};
use crate::{
    dispatch::{Backend, Dispatch},
    error::Result,
};

/// Options of [`selective_scan`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SelectiveScanOptions<'a> {
    /// `[D]`, f32, f16 or bf16: `d · u` is added to each output. Default: nothing is.
    pub d: Option<&'a Array>,
    /// Of the shape and dtype of `u`: each output, with what `d` adds to it, is multiplied by `silu(z)`. Default: by one.
    pub z: Option<&'a Array>,
    /// `[D]`, f32, f16 or bf16: added to each `delta` before anything else. Default: nothing is.
    pub delta_bias: Option<&'a Array>,
    /// Whether `ln(1 + exp(delta + delta_bias))` stands for `delta`. Default: no.
    pub delta_softplus: bool,
    /// `[B, D, N]`, f32: the state before the first step; with `segments`, one of each of them. Default: zeros.
    pub initial_state: Option<&'a Array>,
    /// Where sequences of several lengths begin and end, laid one after another in a batch of one: sequence `i` has the
    /// steps `segments[i]..segments[i + 1]`, and may have none. They start at 0, end at `L` and do not fall. Each starts
    /// anew, and has an initial and a final state of its own.
    ///
    /// Numbers of the host and no array, for whoever packs a batch knows them, and so all of them are checked. A batch of
    /// more is packed by reshaping it to a batch of one. Default: each row of the batch is one sequence.
    pub segments: Option<&'a [i32]>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// Options of [`selective_state_update`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SelectiveStepOptions<'a> {
    /// See [`SelectiveScanOptions::d`].
    pub d: Option<&'a Array>,
    /// `[B, D]`; see [`SelectiveScanOptions::z`].
    pub z: Option<&'a Array>,
    /// See [`SelectiveScanOptions::delta_bias`].
    pub delta_bias: Option<&'a Array>,
    /// See [`SelectiveScanOptions::delta_softplus`].
    pub delta_softplus: bool,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

/// Runs a diagonal linear recurrence whose decay, input and output depend on the step: the selective state-space model
/// of Mamba.
///
/// For each channel `d` and state `n`, with `Δ_t = delta_t`, biased and softplus where asked for:
/// ```text
/// h_t[d, n] = exp(Δ_t[d] · a[d, n]) · h_{t-1}[d, n] + Δ_t[d] · b_t[n] · u_t[d]
/// y_t[d]    = Σ_n c_t[n] · h_t[d, n] + d[d] · u_t[d],   times silu(z_t[d]) where there is a z
/// ```
/// All of it is in f32 whatever the dtype. It stays in range where `Δ · a` is not above zero.
///
/// # Shapes
/// Channels are the last axis, as everywhere in MLX, where `mamba_ssm` has `[B, D, L]`.
/// - `u`: `[B, L, D]`, f32, f16 or bf16
/// - `delta`: `[B, L, D]`, the same dtype
/// - `a`: `[D, N]`, f32, f16 or bf16
/// - `b`, `c`: `[B, L, N]`, the dtype of `u`; or `[B, L, G, N]` where `G` divides `D`: channel `d` reads group
///   `d / (D / G)`
/// - result: `[B, L, D]`, the dtype of `u`
///
/// # Errors
/// When an array or an option has another shape or dtype than these, when `D` or `N` is zero, when `G` does not divide
/// `D`, or when `segments` are given for a batch that is not one, do not start at 0, fall, or do not end at `L`; or when the backend asked for cannot take it.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{SelectiveScanOptions, selective_scan};
/// use mlx_rs::{Array, array};
///
/// // One channel, one state that halves at each step and takes in all of what comes.
/// let ones = Array::ones::<f32>(&[1, 3, 1])?;
/// let a = array!([[0.5_f32.ln()]]);
/// let y = selective_scan(&ones, &ones, &a, &ones, &ones, SelectiveScanOptions::default())?;
/// assert!(y.all_close(array!([[[1.0], [1.5], [1.75]]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Kernel` reads each input once and keeps the states in registers; for its gradient, whose kernel computes those between
/// anew, it also writes them every 16 steps, or within [`inference`](crate::kernel::inference) the first of each sequence
/// alone.
/// `Auto` takes it where it was measured to win, for no fewer steps than `MLX_PRIMITIVES_MIN_SEQ_FOR_METAL` says. `Reference`
/// goes through blocks of 64 steps, and holds `[B, 64, D, N]` at a time. MLX has no op for it.
///
/// Gu and Dao, [Mamba: Linear-Time Sequence Modeling with Selective State Spaces](https://arxiv.org/abs/2312.00752),
/// 2023.
pub fn selective_scan(
    u: impl AsRef<Array>,
    delta: impl AsRef<Array>,
    a: impl AsRef<Array>,
    b: impl AsRef<Array>,
    c: impl AsRef<Array>,
    options: SelectiveScanOptions<'_>,
) -> Result<Array> {
    Ok(selective_scan_with_state(u, delta, a, b, c, options)?.0)
}

/// [`selective_scan`], and the state after the last step, to go on from there.
///
/// # Shapes
/// Those of [`selective_scan`], and
/// - final state: `[B, D, N]`, f32; with [`segments`](SelectiveScanOptions::segments), one of each of them
///
/// # Errors
/// Those of [`selective_scan`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{
///     SelectiveScanOptions, SelectiveStepOptions, selective_scan_with_state, selective_state_update,
/// };
/// use mlx_rs::{Array, array};
///
/// let ones = Array::ones::<f32>(&[1, 2, 1])?;
/// let a = array!([[0.5_f32.ln()]]);
/// let options = SelectiveScanOptions::default();
/// let (_, state) = selective_scan_with_state(&ones, &ones, &a, &ones, &ones, options)?;
/// let one = Array::ones::<f32>(&[1, 1])?;
/// let (y, _) = selective_state_update(&state, &one, &one, &a, &one, &one, SelectiveStepOptions::default())?;
/// assert!(y.all_close(array!([[1.75]]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn selective_scan_with_state(
    u: impl AsRef<Array>,
    delta: impl AsRef<Array>,
    a: impl AsRef<Array>,
    b: impl AsRef<Array>,
    c: impl AsRef<Array>,
    options: SelectiveScanOptions<'_>,
) -> Result<(Array, Array)> {
    let given = Given {
        u: u.as_ref(),
        delta: delta.as_ref(),
        a: a.as_ref(),
        b: b.as_ref(),
        c: c.as_ref(),
        options,
    };
    scan(&Problem::of_sequences(&given)?, options.dispatch)
}

/// [`selective_scan`] of one step, from a state to the next: what decoding a token takes.
///
/// # Shapes
/// - `state`: `[B, D, N]`, f32
/// - `u`, `delta`: `[B, D]`, f32, f16 or bf16, both alike
/// - `a`: `[D, N]`, f32, f16 or bf16
/// - `b`, `c`: `[B, N]` or `[B, G, N]`, the dtype of `u`
/// - results: `y`, `[B, D]`, of the dtype of `u`, and the new state, `[B, D, N]`, f32
///
/// # Errors
/// When an array or an option has another shape or dtype than these, when `D` or `N` is zero, or when `G` does not divide
/// `D`.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// See [`selective_scan_with_state`].
pub fn selective_state_update(
    state: impl AsRef<Array>,
    u: impl AsRef<Array>,
    delta: impl AsRef<Array>,
    a: impl AsRef<Array>,
    b: impl AsRef<Array>,
    c: impl AsRef<Array>,
    options: SelectiveStepOptions<'_>,
) -> Result<(Array, Array)> {
    let SelectiveStepOptions { d, z, delta_bias, delta_softplus, dispatch } = options;
    let initial_state = Some(state.as_ref());
    let options = SelectiveScanOptions {
        d,
        z,
        delta_bias,
        delta_softplus,
        initial_state,
        segments: None,
        dispatch,
    };
    let given = Given {
        u: u.as_ref(),
        delta: delta.as_ref(),
        a: a.as_ref(),
        b: b.as_ref(),
        c: c.as_ref(),
        options,
    };
    let (y, state) = scan(&Problem::of_one_step(&given)?, dispatch)?;
    Ok((y.squeeze_axes(&[1])?, state))
}

fn scan(problem: &Problem, dispatch: Dispatch) -> Result<(Array, Array)> {
    let backend = dispatch.resolve(problem)?;
    let [y, state] = match backend {
        _ if problem.is_empty() => problem.nothing(),
        Backend::Kernel => kernel::scan(problem),
        Backend::Builtin | Backend::Reference => {
            reference::scan(&problem.operands.as_ref(), &problem.rule)
        }
    }?;
    Ok((y, state))
}
