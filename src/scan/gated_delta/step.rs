//! One step, for decoding.

use mlx_rs::{Array, Dtype};

use crate::{
    check::{Check, axes},
    error::Result,
    scan::gated_linear::{GatedLinearStep, Step},
};

/// Takes one step of [`gated_delta_rule`](super::gated_delta_rule): the result and the next state, in time that does not
/// depend on how many steps came before.
///
/// # Shapes
/// - `state`: `[B, H, D, D_v]`, f32, f16 or bf16
/// - `input`: as [`GatedLinearStep`] says, f32, f16 or bf16
/// - `beta`: `[B, H]`, f32, f16 or bf16
/// - results: `[B, H, D_v]` in the dtype of the values, and `[B, H, D, D_v]` in f32
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when a dtype is not floating point, when there
/// is a decay for each element of a key, or when `scale` is not finite.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearStep, gated_delta_rule_step};
/// use mlx_rs::{Array, array};
///
/// let (state, one) = (Array::full::<f32>(&[1, 1, 1, 1], array!(3.0))?, Array::ones::<f32>(&[1, 1, 1])?);
/// let step = GatedLinearStep { queries: &one, keys: &one, values: &one, log_decay: None, scale: None };
/// let (y, _) = gated_delta_rule_step(state, step, Array::ones::<f32>(&[1, 1])?)?;
/// assert!(y.all_close(array!(1.0), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn gated_delta_rule_step(
    state: impl AsRef<Array>,
    input: GatedLinearStep<'_>,
    beta: impl AsRef<Array>,
) -> Result<(Array, Array)> {
    let (state, beta) = (state.as_ref(), beta.as_ref());
    let check = Check::op("gated_delta_rule_step");
    let step = Step::new(check, state, input)?;
    let [batch, heads] = [state.dim(0), state.dim(1)];
    check.floating("beta", beta)?;
    check.shape("beta", beta, axes![batch, heads])?;
    if let Some(decay) = input.log_decay.filter(|decay| decay.ndim() == 3) {
        check.shape("log_decay", decay, axes![batch, heads])?;
    }
    let faded = step.faded(state)?;
    let column = step.keys.expand_dims(-1)?;
    let found = step.keys.expand_dims(-2)?.matmul(&faded)?;
    let beta = beta.as_dtype(Dtype::Float32)?.expand_dims_axes(&[-1, -2])?;
    let written = step.values.expand_dims(-2)?.subtract(found)?.multiply(beta)?;
    step.read(faded.add(column.multiply(written)?)?)
}
