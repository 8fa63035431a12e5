//! Short convolutions that see no later step, each channel by itself.

mod module;

pub use module::{CausalConv1d, CausalConv1dBuilder};

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, sigmoid, zeros_dtype},
};

use super::segments;
use crate::{
    check::{Check, axes},
    error::Result,
};

/// Options of [`causal_conv1d`].
#[derive(Debug, Clone, Copy, Default)]
pub struct CausalConvOptions<'a> {
    /// `[D]`, f32, f16 or bf16: added to each output. Default: nothing is.
    pub bias: Option<&'a Array>,
    /// Whether `silu` of each output, bias included, stands for it. Default: no.
    pub silu: bool,
    /// `[B, W − 1, D]`, of the dtype of `x`: the inputs before the first; with `segments`, those of each of them. Default:
    /// zeros.
    pub initial_state: Option<&'a Array>,
    /// See [`SelectiveScanOptions::segments`](super::SelectiveScanOptions::segments).
    pub segments: Option<&'a [i32]>,
}

/// Convolves each channel with a few weights of its own, so that a step sees itself and the `W − 1` before it.
///
/// `y_t[d] = bias[d] + Σ_k weight[d, k] · x_{t − W + 1 + k}[d]`, or `silu` of it, in f32 whatever the dtype: the last weight
/// meets the step itself.
///
/// # Shapes
/// - `x`: `[B, L, D]`, f32, f16 or bf16
/// - `weight`: `[D, W]`, f32, f16 or bf16
/// - result: `[B, L, D]`, the dtype of `x`
///
/// # Errors
/// When an array or an option has another shape or dtype than these, when `W` or `D` is zero, or when `segments` are none
/// of `x`.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{CausalConvOptions, causal_conv1d};
/// use mlx_rs::array;
///
/// let x = array!([[[1.0], [2.0], [3.0]]]);
/// let y = causal_conv1d(&x, array!([[10.0, 1.0]]), CausalConvOptions::default())?;
/// assert_eq!(y.reshape(&[-1])?.as_slice::<f32>(), [1.0, 12.0, 23.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops: a product and a sum for each weight.
pub fn causal_conv1d(
    x: impl AsRef<Array>,
    weight: impl AsRef<Array>,
    options: CausalConvOptions<'_>,
) -> Result<Array> {
    Ok(causal_conv1d_with_state(x, weight, options)?.0)
}

/// [`causal_conv1d`], and the inputs that later steps will see, to go on from there.
///
/// # Shapes
/// Those of [`causal_conv1d`], and
/// - final state: `[B, W − 1, D]`, of the dtype of `x`; with [`segments`](CausalConvOptions::segments), one of each of them
///
/// # Errors
/// Those of [`causal_conv1d`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{CausalConvOptions, causal_conv1d_with_state};
/// use mlx_rs::array;
///
/// let weight = array!([[10.0, 1.0]]);
/// let (_, state) = causal_conv1d_with_state(array!([[[1.0], [2.0]]]), &weight, Default::default())?;
/// let options = CausalConvOptions { initial_state: Some(&state), ..Default::default() };
/// let (y, _) = causal_conv1d_with_state(array!([[[3.0]]]), &weight, options)?;
/// assert_eq!(y.as_slice::<f32>(), [23.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn causal_conv1d_with_state(
    x: impl AsRef<Array>,
    weight: impl AsRef<Array>,
    options: CausalConvOptions<'_>,
) -> Result<(Array, Array)> {
    let (x, weight) = (x.as_ref(), weight.as_ref());
    let check = Check::op("causal_conv1d");
    let dtype = check.floating("x", x)?;
    check.shape("x", x, axes!["B", "L", "D"])?;
    let channels = check.last_axis("x", x)?;
    check.floating("weight", weight)?;
    check.shape("weight", weight, axes![channels, "W"])?;
    let before = check.last_axis("weight", weight)? - 1;
    if let Some(bias) = options.bias {
        check.floating("bias", bias)?;
        check.shape("bias", bias, axes![channels])?;
    }
    let sequences = segments::count(check, options.segments, x.dim(0), x.dim(1))?;
    if let Some(state) = options.initial_state {
        check.dtype_among("initial_state", state, &[dtype])?;
        check.shape("initial_state", state, axes![sequences, before, channels])?;
    }
    let shape = [sequences, before, channels];
    let state = match options.initial_state {
        Some(state) => state.clone(),
        None => zeros_dtype(&shape, dtype)?,
    };
    if x.size() == 0 {
        return Ok((x.clone(), state));
    }
    let segments = options.segments.unwrap_or_default();
    let [y, state] = if segments.is_empty() {
        convolve(x, weight, &state, &options)?
    } else {
        by_segment(x, weight, &state, segments, &options)?
    };
    Ok((y, state))
}

fn by_segment(
    x: &Array,
    weight: &Array,
    states: &Array,
    segments: &[i32],
    options: &CausalConvOptions,
) -> Result<[Array; 2]> {
    let (mut outputs, mut ends) = (Vec::new(), Vec::new());
    for (which, pair) in (0..).zip(segments.windows(2)) {
        let (begin, end) = (pair[0], pair[1]);
        let state = states.try_index(which..which + 1)?;
        let [y, end] = convolve(&x.try_index((.., begin..end))?, weight, &state, options)?;
        outputs.push(y);
        ends.push(end);
    }
    Ok([concatenate(&outputs, 1)?, concatenate(&ends, 0)?])
}

/// Outputs and final state of sequences that are rows of the batch.
fn convolve(
    x: &Array,
    weight: &Array,
    state: &Array,
    options: &CausalConvOptions,
) -> Result<[Array; 2]> {
    let (length, width) = (x.dim(1), weight.dim(1));
    if length == 0 {
        return Ok([x.clone(), state.clone()]);
    }
    let all = if width == 1 { x.clone() } else { concatenate(&[state, x], 1)? };
    let end = all.try_index((.., length..))?;
    let all = all.as_dtype(Dtype::Float32)?;
    let weight = weight.as_dtype(Dtype::Float32)?;
    let mut y = None;
    for k in 0..width {
        let seen = all.try_index((.., k..k + length))?;
        let share = seen.multiply(weight.try_index((.., k))?)?;
        y = Some(match y {
            None => share,
            Some(sum) => share.add(sum)?,
        });
    }
    let mut y = y.unwrap_or(all);
    if let Some(bias) = options.bias {
        y = y.add(bias.as_dtype(Dtype::Float32)?)?;
    }
    if options.silu {
        y = y.multiply(sigmoid(&y)?)?;
    }
    Ok([y.as_dtype(x.dtype())?, end])
}
