//! S4 with a diagonal state matrix, as a layer.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::Module,
    ops::{
        indexing::{IntoStrideBy, TryIndexOp},
        split_equal,
    },
};

use super::{DiagonalSsm, DiagonalState};
use crate::{
    activation::Activation,
    activation::{GluOptions, gelu, glu},
    builder::builder,
    check::{Check, axes},
    error::Result,
    layers::Projection,
};

const CHECK: Check = Check::op("S4");

builder! {
    /// Builder for [`S4`].
    S4Builder => S4 (
        /// The size of the last axis, `D`.
        dims: i32,
    ) {
        /// States of a channel, in pairs of conjugates: even, 1024 at most; [`S4::DEFAULT_D_STATE`] by default.
        d_state: i32 = S4::DEFAULT_D_STATE,
        /// Whether each step sees those after it too; `false` by default.
        bidirectional: bool = false,
        /// The lengths of steps to start with, smallest and largest; [`DiagonalSsm::DEFAULT_DT_RANGE`] by default.
        dt_range: (f32, f32) = DiagonalSsm::DEFAULT_DT_RANGE,
    }
}

/// A state-space layer: each channel through a [`DiagonalSsm`] of its own, then GELU and a gated projection that mixes them.
///
/// `y = a · σ(b)` with `[a, b] = output(gelu(ssm(x)))`. A sequence at once is a convolution by fast Fourier transforms, and
/// [`S4::step`] the recurrence that computes the same.
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`, f32, f16 or bf16; the scan is in f32 whatever the dtype.
///
/// # Example
/// ```
/// use mlx_primitives::ssm::S4;
/// use mlx_rs::{Array, module::Module};
///
/// let mut layer = S4::new(16)?;
/// let mut state = None;
/// layer.forward((&Array::ones::<f32>(&[1, 100, 16])?, &mut state))?;
/// assert_eq!(layer.step(Array::ones::<f32>(&[1, 16])?, &mut state)?.shape(), [1, 16]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Gu, Goel and Ré, [Efficiently Modeling Long Sequences with Structured State Spaces](https://arxiv.org/abs/2111.00396),
/// 2021; the diagonal form and its start as in [`DiagonalSsm`]'s source.
#[derive(Debug, Clone, ModuleParameters)]
pub struct S4 {
    /// From the past.
    #[param]
    pub ssm: DiagonalSsm,
    /// From the future, if it is bidirectional.
    #[param]
    pub reverse_ssm: Option<DiagonalSsm>,
    /// `dims` to twice as many.
    #[param]
    pub output: Projection,
    dims: i32,
}

/// Input of [`S4`]: `x`, and what is known of earlier steps.
#[derive(Debug)]
pub struct S4Input<'a> {
    /// `[B, L, dims]`.
    pub x: &'a Array,
    /// Of one layer and one batch of sequences, none at first; this call adds its steps, unless it fails.
    pub state: Option<&'a mut Option<DiagonalState>>,
}

impl<'a> From<&'a Array> for S4Input<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, state: None }
    }
}

impl<'a> From<(&'a Array, &'a mut Option<DiagonalState>)> for S4Input<'a> {
    fn from((x, state): (&'a Array, &'a mut Option<DiagonalState>)) -> Self {
        Self { x, state: Some(state) }
    }
}

impl S4 {
    /// The default of [`S4Builder::d_state`].
    pub const DEFAULT_D_STATE: i32 = 64;

    /// A layer that sees the past alone.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(S4Builder::new(dims))
    }

    fn assemble(builder: S4Builder) -> Result<Self> {
        let S4Builder { dims, d_state, bidirectional, dt_range } = builder;
        CHECK.at_least("dims", dims, 1)?;
        let fits = dims <= i32::MAX / 2;
        CHECK.value(fits, "dims", "be below 2^30", dims)?;
        let ssm = || DiagonalSsm::new(CHECK, dims, d_state, dt_range);
        let reverse_ssm = if bidirectional { Some(ssm()?) } else { None };
        let output = Projection::random(dims, 2 * dims, true)?;
        Ok(Self { ssm: ssm()?, reverse_ssm, output, dims })
    }

    /// [`Module::forward`] of one step, which costs the same however many came before.
    ///
    /// # Shapes
    /// `x`: `[B, dims]`; the result has its shape.
    ///
    /// # Errors
    /// When `x` is of another shape or dtype, when the state is that of another layer or batch, or when the layer is
    /// bidirectional.
    pub fn step(
        &mut self,
        x: impl AsRef<Array>,
        state: &mut Option<DiagonalState>,
    ) -> Result<Array> {
        let x = x.as_ref();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", self.dims])?;
        self.check_state(state.as_ref(), x.dim(0))?;
        let u = x.as_dtype(Dtype::Float32)?.expand_dims(-1)?;
        let (y, next) = self.ssm.step(&u, state.as_ref())?;
        let y = self.mixed(&y.squeeze_axes(&[-1])?, x.dtype())?;
        *state = Some(next);
        Ok(y)
    }

    fn check_state(&self, state: Option<&DiagonalState>, batch: i32) -> Result<()> {
        let one_way = self.reverse_ssm.is_none();
        CHECK.value(one_way, "state", "be absent, for a bidirectional layer has none", "one")?;
        match state {
            Some(state) => self.ssm.check_state(CHECK, state, batch, 1),
            None => Ok(()),
        }
    }

    /// `[..., dims]` of what the channels made of themselves.
    fn mixed(&mut self, y: &Array, dtype: Dtype) -> Result<Array> {
        let y = self.output.forward(&gelu(y.as_dtype(dtype)?)?)?;
        let halves = split_equal(y, 2, -1)?;
        let options = GluOptions { activation: Activation::Sigmoid, ..Default::default() };
        glu(&halves[1], &halves[0], options)
    }
}

/// Backwards along the axis of time.
fn reversed(array: &Array) -> Result<Array> {
    Ok(array.try_index((.., (..).stride_by(-1)))?)
}

impl<'a, I: Into<S4Input<'a>>> Module<I> for S4 {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let S4Input { x, state } = input.into();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", "L", self.dims])?;
        if let Some(state) = &state {
            self.check_state(state.as_ref(), x.dim(0))?;
        }
        if x.size() == 0 {
            return Ok(self.mixed(x, x.dtype())?);
        }
        let u = x.as_dtype(Dtype::Float32)?.expand_dims(-1)?;
        let before = state.as_ref().and_then(|state| (**state).clone());
        let (mut y, next) = self.ssm.convolve(&u, before.as_ref())?;
        if let Some(ssm) = &self.reverse_ssm {
            let (from_end, _) = ssm.convolve(&reversed(&u)?, None)?;
            y = y.add(reversed(&from_end)?)?;
        }
        let y = self.mixed(&y.squeeze_axes(&[-1])?, x.dtype())?;
        if let Some(state) = state {
            *state = Some(next);
        }
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.output.training_mode(mode);
    }
}
