//! One step, for decoding.

use mlx_rs::{
    Array, Dtype,
    ops::{exp, maximum},
};

use crate::{
    check::{Check, axes},
    error::Result,
    scan::fading::NOTHING_LEFT,
    uploads,
};

/// What [`gated_linear_attention_step`] takes a step with.
#[derive(Debug, Clone, Copy)]
pub struct GatedLinearStep<'a> {
    /// `[B, H, D]`
    pub queries: &'a Array,
    /// `[B, H, D]`
    pub keys: &'a Array,
    /// `[B, H, D_v]`
    pub values: &'a Array,
    /// `[H]`, `[B, H]` or `[B, H, D]`: as [`GatedLinearOptions::log_decay`](super::GatedLinearOptions::log_decay).
    pub log_decay: Option<&'a Array>,
    /// As [`GatedLinearOptions::scale`](super::GatedLinearOptions::scale).
    pub scale: Option<f32>,
}

/// Takes one step of [`gated_linear_attention`](super::gated_linear_attention): the result and the next state, in time that
/// does not depend on how many steps came before.
///
/// # Shapes
/// - `state`: `[B, H, D, D_v]`, f32, f16 or bf16
/// - `input`: as [`GatedLinearStep`] says, f32, f16 or bf16
/// - results: `[B, H, D_v]` in the dtype of the values, and `[B, H, D, D_v]` in f32
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when a dtype is not floating point, or when
/// `scale` is not finite.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearStep, gated_linear_attention_step};
/// use mlx_rs::{Array, array};
///
/// let (state, one) = (Array::ones::<f32>(&[1, 1, 1, 1])?, Array::ones::<f32>(&[1, 1, 1])?);
/// let decay = array!([0.5_f32.ln()]);
/// let step = GatedLinearStep { queries: &one, keys: &one, values: &one, log_decay: Some(&decay), scale: None };
/// let (y, state) = gated_linear_attention_step(state, step)?;
/// assert!(y.all_close(array!(1.5), None, None, None)? && state.all_close(array!(1.5), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn gated_linear_attention_step(
    state: impl AsRef<Array>,
    input: GatedLinearStep<'_>,
) -> Result<(Array, Array)> {
    let state = state.as_ref();
    let step = Step::new(Check::op("gated_linear_attention_step"), state, input)?;
    let state = step
        .faded(state)?
        .add(step.keys.expand_dims(-1)?.multiply(step.values.expand_dims(-2)?)?)?;
    step.read(state)
}

/// A checked step of this or of the gated delta rule, in f32.
pub(in crate::scan) struct Step<'a> {
    input: GatedLinearStep<'a>,
    /// `[B, H, D]`
    pub(in crate::scan) keys: Array,
    /// `[B, H, D_v]`
    pub(in crate::scan) values: Array,
    scale: f32,
}

impl<'a> Step<'a> {
    pub(in crate::scan) fn new(
        check: Check,
        state: &Array,
        input: GatedLinearStep<'a>,
    ) -> Result<Self> {
        let GatedLinearStep { queries, keys, values, log_decay, scale } = input;
        check.floating("queries", queries)?;
        check.shape("queries", queries, axes!["B", "H", "D"])?;
        check.floating("keys", keys)?;
        check.same_shape("keys", keys, queries)?;
        let [batch, heads, size] = [queries.dim(0), queries.dim(1), queries.dim(2)];
        check.floating("values", values)?;
        check.shape("values", values, axes![batch, heads, "D_v"])?;
        check.floating("state", state)?;
        check.shape("state", state, axes![batch, heads, size, values.dim(2)])?;
        if let Some(decay) = log_decay {
            check.floating("log_decay", decay)?;
            match decay.ndim() {
                1 => check.shape("log_decay", decay, axes![heads])?,
                2 => check.shape("log_decay", decay, axes![batch, heads])?,
                _ => check.shape("log_decay", decay, axes![batch, heads, size])?,
            }
        }
        let scale = scale.unwrap_or_else(|| 1.0 / (size.max(1) as f32).sqrt());
        check.finite("scale", scale)?;
        let wide = |array: &Array| array.as_dtype(Dtype::Float32);
        Ok(Self { input, keys: wide(keys)?, values: wide(values)?, scale })
    }

    /// What is left of the state.
    pub(in crate::scan) fn faded(&self, state: &Array) -> Result<Array> {
        let state = state.as_dtype(Dtype::Float32)?;
        let Some(decay) = self.input.log_decay else { return Ok(state) };
        let left = exp(maximum(decay.as_dtype(Dtype::Float32)?, uploads::float(NOTHING_LEFT))?)?;
        let left = if decay.ndim() == 3 { left } else { left.expand_dims(-1)? };
        Ok(state.multiply(left.expand_dims(-1)?)?)
    }

    pub(in crate::scan) fn read(&self, state: Array) -> Result<(Array, Array)> {
        let queries = self.input.queries.as_dtype(Dtype::Float32)?;
        let queries = queries.multiply(uploads::float(self.scale))?.expand_dims(-2)?;
        let y = queries.matmul(&state)?.squeeze_axes(&[-2])?;
        Ok((y.as_dtype(self.input.values.dtype())?, state))
    }
}
