//! H3: a layer of two state-space models and two products.

use mlx_rs::{Array, Dtype, error::Exception, macros::ModuleParameters, module::Module};

use super::{DiagonalSsm, DiagonalState};
use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
    layers::Projection,
    scan::{CausalConv1d, CausalConv1dBuilder},
};

const CHECK: Check = Check::op("H3");

builder! {
    /// Builder for [`H3`].
    H3Builder => H3 (
        /// The size of the last axis.
        dims: i32,
    ) {
        /// States of the diagonal model: even, 1024 at most; [`H3::DEFAULT_D_STATE`] by default.
        d_state: i32 = H3::DEFAULT_D_STATE,
        /// States of the shift model, each of which is one of the last keys; [`H3::DEFAULT_D_SHIFT`] by default.
        d_shift: i32 = H3::DEFAULT_D_SHIFT,
        /// Elements of a head, which must divide `dims`; one by default. Memory grows as `dims · head_dim`.
        head_dim: i32 = 1,
        /// The lengths of steps to start with, smallest and largest; [`DiagonalSsm::DEFAULT_DT_RANGE`] by default.
        dt_range: (f32, f32) = DiagonalSsm::DEFAULT_DT_RANGE,
        /// Whether the projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// Attention-like recall by state-space models: the shift model lets a key meet the value after it, the diagonal one keeps
/// what met, and a query reads it.
///
/// ```text
/// q, k, v = q_proj(x), k_proj(x), v_proj(x)
/// kv_t    = ssm_shift(k)_t ⊗ v_t                 [head_dim, head_dim] a head
/// o_t     = q_t · ssm_diagonal(kv)_t
/// y       = out_proj(o)
/// ```
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`; the models are in f32 whatever the dtype.
///
/// # Example
/// ```
/// use mlx_primitives::ssm::{H3Builder, H3State};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut layer = H3Builder::new(16).head_dim(4).build()?;
/// let mut state = H3State::default();
/// layer.forward((&Array::ones::<f32>(&[1, 100, 16])?, &mut state))?;
/// assert_eq!(layer.step(Array::ones::<f32>(&[1, 16])?, &mut state)?.shape(), [1, 16]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Fu, Dao, Saab, Thomas, Rudra and Ré, [Hungry Hungry Hippos: Towards Language Modeling with State Space
/// Models](https://arxiv.org/abs/2212.14052), 2022.
#[derive(Debug, Clone, ModuleParameters)]
pub struct H3 {
    /// `dims` to `dims`.
    #[param]
    pub q_proj: Projection,
    /// `dims` to `dims`.
    #[param]
    pub k_proj: Projection,
    /// `dims` to `dims`.
    #[param]
    pub v_proj: Projection,
    /// The shift model, whose state is a window of keys, and so a convolution with any weights.
    #[param]
    pub shift: CausalConv1d,
    /// One system for each head.
    #[param]
    pub diagonal: DiagonalSsm,
    /// `dims` to `dims`.
    #[param]
    pub out_proj: Projection,
    dims: i32,
    head_dim: i32,
}

/// What an [`H3`] knows of the steps so far, however many. It begins with none.
#[derive(Debug, Clone, Default)]
pub struct H3State {
    pub(super) parts: Option<(Array, DiagonalState)>,
}

impl H3State {
    /// The last `d_shift − 1` keys, `[B, d_shift − 1, dims]`, f32, once there were some.
    pub fn keys(&self) -> Option<&Array> {
        self.parts.as_ref().map(|(keys, _)| keys)
    }

    /// The states of the diagonal model, of `head_dim²` sequences a head, once there are some.
    pub fn diagonal(&self) -> Option<&DiagonalState> {
        self.parts.as_ref().map(|(_, diagonal)| diagonal)
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Input of [`H3`]: `x`, and what is known of earlier steps.
#[derive(Debug)]
pub struct H3Input<'a> {
    /// `[B, L, dims]`.
    pub x: &'a Array,
    /// Of one layer and one batch of sequences; this call adds its steps, unless it fails.
    pub state: Option<&'a mut H3State>,
}

impl<'a> From<&'a Array> for H3Input<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, state: None }
    }
}

impl<'a> From<(&'a Array, &'a mut H3State)> for H3Input<'a> {
    fn from((x, state): (&'a Array, &'a mut H3State)) -> Self {
        Self { x, state: Some(state) }
    }
}

impl H3 {
    /// The default of [`H3Builder::d_state`].
    pub const DEFAULT_D_STATE: i32 = 64;

    /// The default of [`H3Builder::d_shift`].
    pub const DEFAULT_D_SHIFT: i32 = 64;

    /// A layer with heads of one element.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(H3Builder::new(dims))
    }

    fn assemble(builder: H3Builder) -> Result<Self> {
        use mlx_rs::builder::Builder;
        let H3Builder { dims, d_state, d_shift, head_dim, dt_range, bias } = builder;
        CHECK.at_least("dims", dims, 1)?;
        CHECK.at_least("d_shift", d_shift, 1)?;
        CHECK.at_least("head_dim", head_dim, 1)?;
        let divides = dims % head_dim == 0;
        CHECK.value(divides, "head_dim", format_args!("divide dims = {dims}"), head_dim)?;
        let met = dims.checked_mul(head_dim);
        CHECK.known(met, "head_dim", "make fewer than 2^31 products a step", head_dim)?;
        let projection = || Projection::random(dims, dims, bias);
        Ok(Self {
            q_proj: projection()?,
            k_proj: projection()?,
            v_proj: projection()?,
            shift: CausalConv1dBuilder::new(dims, d_shift).bias(false).build()?,
            diagonal: DiagonalSsm::new(CHECK, dims / head_dim, d_state, dt_range)?,
            out_proj: projection()?,
            dims,
            head_dim,
        })
    }

    /// [`Module::forward`] of one step, which costs the same however many came before.
    ///
    /// # Shapes
    /// `x`: `[B, dims]`; the result has its shape.
    ///
    /// # Errors
    /// When `x` is of another shape or dtype, or the state is that of another layer or batch.
    pub fn step(&mut self, x: impl AsRef<Array>, state: &mut H3State) -> Result<Array> {
        let x = x.as_ref();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", self.dims])?;
        self.check_state(state, x.dim(0))?;
        let x = x.expand_dims(1)?;
        let (queries, met, keys) = self.met(&x, state.keys())?;
        let (kept, diagonal) = self.diagonal.step(&met.squeeze_axes(&[1])?, state.diagonal())?;
        let y = self.read(&queries, &kept.expand_dims(1)?, x.dtype())?;
        state.parts = Some((keys, diagonal));
        Ok(y.squeeze_axes(&[1])?)
    }

    fn check_state(&self, state: &H3State, batch: i32) -> Result<()> {
        match state.diagonal() {
            Some(diagonal) => {
                let copies = self.head_dim * self.head_dim;
                self.diagonal.check_state(CHECK, diagonal, batch, copies)
            }
            None => Ok(()),
        }
    }

    /// Queries, `[B, L, H, head_dim]`, what keys met, `[B, L, H, head_dim²]`, both f32, and the keys to remember.
    fn met(&mut self, x: &Array, before: Option<&Array>) -> Result<(Array, Array, Array)> {
        let float = |array: Array| array.as_dtype(Dtype::Float32);
        let [batch, length, heads] = [x.dim(0), x.dim(1), self.dims / self.head_dim];
        let by_head = [batch, length, heads, self.head_dim];
        let (keys, next) = self.shift.with_state(&float(self.k_proj.forward(x)?)?, before)?;
        let queries = float(self.q_proj.forward(x)?)?.reshape(&by_head)?;
        let values = float(self.v_proj.forward(x)?)?.reshape(&by_head)?;
        let keys = keys.reshape(&by_head)?.expand_dims(-1)?;
        let met = keys.multiply(values.expand_dims(-2)?)?;
        let met = met.reshape(&[batch, length, heads, self.head_dim * self.head_dim])?;
        Ok((queries, met, next))
    }

    /// The output for `queries`, of what the diagonal model kept.
    fn read(&mut self, queries: &Array, kept: &Array, dtype: Dtype) -> Result<Array> {
        let [batch, length] = [kept.dim(0), kept.dim(1)];
        let heads = self.dims / self.head_dim;
        let kept = kept.reshape(&[batch, length, heads, self.head_dim, self.head_dim])?;
        let read = queries.expand_dims(-2)?.matmul(kept)?;
        let read = read.reshape(&[batch, length, self.dims])?.as_dtype(dtype)?;
        Ok(self.out_proj.forward(&read)?)
    }
}

impl<'a, I: Into<H3Input<'a>>> Module<I> for H3 {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let H3Input { x, state } = input.into();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", "L", self.dims])?;
        if let Some(state) = &state {
            self.check_state(state, x.dim(0))?;
        }
        if x.size() == 0 {
            return self.out_proj.forward(x);
        }
        let before = state.as_ref().and_then(|state| state.parts.clone()).unzip();
        let (queries, met, keys) = self.met(x, before.0.as_ref())?;
        let (kept, diagonal) = self.diagonal.convolve(&met, before.1.as_ref())?;
        let y = self.read(&queries, &kept, x.dtype())?;
        if let Some(state) = state {
            state.parts = Some((keys, diagonal));
        }
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        for projection in [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.out_proj]
        {
            projection.training_mode(mode);
        }
    }
}
