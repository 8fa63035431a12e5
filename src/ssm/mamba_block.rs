//! The block of Mamba: a short convolution and a selective scan between two projections.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    nn,
    ops::{arange, broadcast_to, indexing::TryIndexOp, ones},
    random::uniform,
};

use super::{MambaInput, MambaState, step_range};
use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
    layers::Projection,
    scan::{
        CausalConv1d, CausalConv1dBuilder, SelectiveScanOptions, SelectiveStepOptions,
        selective_scan_with_state, selective_state_update,
    },
    sizes::div_ceil,
};

const CHECK: Check = Check::op("MambaBlock");

builder! {
    /// Builder for [`MambaBlock`].
    MambaBlockBuilder => MambaBlock (
        /// The size of the last axis of input and output.
        dims: i32,
    ) {
        /// States of a channel, `N`; [`MambaBlock::DEFAULT_D_STATE`] by default.
        d_state: i32 = MambaBlock::DEFAULT_D_STATE,
        /// Steps that the convolution sees; [`MambaBlock::DEFAULT_D_CONV`] by default.
        d_conv: i32 = MambaBlock::DEFAULT_D_CONV,
        /// Channels inside for each of `dims`; [`MambaBlock::DEFAULT_EXPAND`] by default.
        expand: i32 = MambaBlock::DEFAULT_EXPAND,
        /// Numbers that the step sizes are made of; `dims / 16` rounded up by default.
        dt_rank: Option<i32> = None,
        /// The step sizes to start with, smallest and largest; [`MambaBlock::DEFAULT_DT_RANGE`] by default.
        dt_range: (f32, f32) = MambaBlock::DEFAULT_DT_RANGE,
        /// Whether the convolution has a bias; `true` by default.
        conv_bias: bool = true,
        /// Whether the outer projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// A selective state-space layer: the mixer of Mamba, under the parameter names of `mamba_ssm`.
///
/// ```text
/// x, z     = in_proj(input), halved
/// x        = silu(conv1d(x))
/// dt, b, c = x_proj(x), split
/// y        = selective_scan(x, dt_proj(dt), −exp(A_log), b, c, D, z, softplus)
/// output   = out_proj(y)
/// ```
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::ssm::{MambaBlock, MambaState};
/// use mlx_rs::{Array, module::Module};
///
/// let mut block = MambaBlock::new(64)?;
/// let mut state = MambaState::default();
/// block.forward((&Array::ones::<f32>(&[1, 10, 64])?, &mut state))?;
/// let y = block.step(Array::ones::<f32>(&[1, 64])?, &mut state)?;
/// assert_eq!(y.shape(), [1, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Gu and Dao, [Mamba: Linear-Time Sequence Modeling with Selective State Spaces](https://arxiv.org/abs/2312.00752),
/// 2023.
#[derive(Debug, Clone, ModuleParameters)]
#[allow(
    non_snake_case,
    reason = "parameters are named as in mamba_ssm, so that its checkpoints load"
)]
pub struct MambaBlock {
    /// `dims` to twice the channels inside.
    #[param]
    pub in_proj: Projection,
    /// Over the channels inside.
    #[param]
    pub conv1d: CausalConv1d,
    /// The channels inside to `dt_rank + 2 · d_state`.
    #[param]
    pub x_proj: Projection,
    /// `dt_rank` to the channels inside. Its bias, which there must be, is added in f32.
    #[param]
    pub dt_proj: nn::Linear,
    /// `[channels inside, d_state]`: the logarithm of how fast each state decays.
    #[param]
    pub A_log: Param<Array>,
    /// `[channels inside]`: what is added of the input.
    #[param]
    pub D: Param<Array>,
    /// The channels inside to `dims`.
    #[param]
    pub out_proj: Projection,
    dims: i32,
}

impl MambaBlock {
    /// The default of [`MambaBlockBuilder::d_state`].
    pub const DEFAULT_D_STATE: i32 = 16;

    /// The default of [`MambaBlockBuilder::d_conv`].
    pub const DEFAULT_D_CONV: i32 = 4;

    /// The default of [`MambaBlockBuilder::expand`].
    pub const DEFAULT_EXPAND: i32 = 2;

    /// The default of [`MambaBlockBuilder::dt_range`].
    pub const DEFAULT_DT_RANGE: (f32, f32) = step_range::DEFAULT;

    /// A block with the sizes of the paper.
    ///
    /// # Errors
    /// When `dims` is below one.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(MambaBlockBuilder::new(dims))
    }

    fn assemble(builder: MambaBlockBuilder) -> Result<Self> {
        let MambaBlockBuilder { dims, d_state, d_conv, expand, conv_bias, bias, .. } = builder;
        for (name, size) in
            [("dims", dims), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)]
        {
            CHECK.at_least(name, size, 1)?;
        }
        let inner = dims.checked_mul(expand).filter(|inner| *inner <= i32::MAX / 2);
        let inner = CHECK.known(inner, "expand", "leave 2 · dims · expand below 2^31", expand)?;
        let dt_rank = builder.dt_rank.unwrap_or(div_ceil(dims, 16));
        CHECK.at_least("dt_rank", dt_rank, 1)?;
        let of_steps = d_state.checked_mul(2).and_then(|states| states.checked_add(dt_rank));
        let of_steps = CHECK.known(of_steps, "d_state", "make a projection below 2^31", d_state)?;
        let range = step_range::check(CHECK, builder.dt_range)?;
        use mlx_rs::builder::Builder;
        Ok(Self {
            in_proj: Projection::random(dims, 2 * inner, bias)?,
            conv1d: CausalConv1dBuilder::new(inner, d_conv).bias(conv_bias).silu(true).build()?,
            x_proj: Projection::random(inner, of_steps, false)?,
            dt_proj: step_sizes(dt_rank, inner, range)?,
            A_log: Param::new(decays(inner, d_state)?),
            D: Param::new(ones::<f32>(&[inner])?),
            out_proj: Projection::random(inner, dims, bias)?,
            dims,
        })
    }

    /// [`Module::forward`] of one step, which costs the same however many came before.
    ///
    /// # Shapes
    /// `x`: `[B, dims]`; the result has its shape.
    ///
    /// # Errors
    /// When `x` is of another shape or dtype, or the state of another block or batch.
    pub fn step(&mut self, x: impl AsRef<Array>, state: &mut MambaState) -> Result<Array> {
        let x = x.as_ref();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", self.dims])?;
        let [x, z] = self.halves(&x.expand_dims(1)?)?;
        let (x, conv) = self.conv1d.with_state(&x, state.conv())?;
        let [delta, b, c] = self.selected(&x)?;
        let [x, z, delta, b, c] = [x, z, delta, b, c].map(|x| x.squeeze_axes(&[1]));
        let (x, z) = (x?, z?);
        let (a, inner) = (self.rates()?, x.dim(1));
        let started = match state.scan() {
            Some(scan) => scan.clone(),
            None => mlx_rs::ops::zeros::<f32>(&[x.dim(0), inner, a.dim(1)])?,
        };
        let options = SelectiveStepOptions {
            d: Some(&self.D),
            z: Some(&z),
            delta_bias: self.dt_proj.bias.value.as_ref(),
            delta_softplus: true,
            ..Default::default()
        };
        let (y, scan) = selective_state_update(started, x, delta?, a, b?, c?, options)?;
        let y = self.out_proj.forward(&y)?;
        state.parts = Some([conv, scan]);
        Ok(y)
    }

    /// What goes through the scan, and its gate.
    fn halves(&mut self, x: &Array) -> Result<[Array; 2]> {
        let both = self.in_proj.forward(x)?;
        let inner = self.D.dim(0);
        Ok([both.try_index((.., .., ..inner))?, both.try_index((.., .., inner..))?])
    }

    /// Of the convolved: the step sizes but for their bias, and what enters and leaves the states.
    fn selected(&mut self, x: &Array) -> Result<[Array; 3]> {
        // A dense projection promotes to the dtype of its weight, a quantized one does not.
        let all = self.x_proj.forward(x)?.as_dtype(x.dtype())?;
        let (rank, states) = (self.dt_proj.weight.dim(1), self.A_log.dim(1));
        let dt = all.try_index((.., .., ..rank))?;
        let b = all.try_index((.., .., rank..rank + states))?;
        let c = all.try_index((.., .., rank + states..))?;
        Ok([dt.matmul(self.dt_proj.weight.t())?.as_dtype(x.dtype())?, b, c])
    }

    /// `a` of the scan.
    fn rates(&self) -> Result<Array> {
        Ok(self.A_log.as_dtype(Dtype::Float32)?.exp()?.negative()?)
    }
}

/// A weight that moves step sizes little, and the bias that they start with.
fn step_sizes(rank: i32, inner: i32, range: (f32, f32)) -> Result<nn::Linear> {
    use mlx_rs::builder::Builder;
    let mut linear = nn::LinearBuilder::new(rank, inner).bias(true).build()?;
    let bound = (rank as f32).sqrt().recip();
    linear.weight.value = uniform::<_, f32>(-bound, bound, &[inner, rank], None)?;
    linear.bias.value = Some(step_range::bias(inner, range)?);
    Ok(linear)
}

/// The logarithms of 1 to `N`, for each channel.
fn decays(inner: i32, states: i32) -> Result<Array> {
    let rates = arange::<_, f32>(1, states + 1, None)?;
    Ok(broadcast_to(rates.log()?, &[inner, states])?.contiguous()?)
}

impl<'a, I: Into<MambaInput<'a>>> Module<I> for MambaBlock {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let MambaInput { x, state } = input.into();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", "L", self.dims])?;
        let [x, z] = self.halves(x)?;
        let before = state.as_ref().and_then(|state| state.parts.clone());
        let (conv, scan) = before.map_or((None, None), |[conv, scan]| (Some(conv), Some(scan)));
        let (x, conv) = self.conv1d.with_state(&x, conv.as_ref())?;
        let [delta, b, c] = self.selected(&x)?;
        let options = SelectiveScanOptions {
            d: Some(&self.D),
            z: Some(&z),
            delta_bias: self.dt_proj.bias.value.as_ref(),
            delta_softplus: true,
            initial_state: scan.as_ref(),
            ..Default::default()
        };
        let (y, scan) = selective_scan_with_state(x, delta, self.rates()?, b, c, options)?;
        let y = self.out_proj.forward(&y)?;
        if let Some(state) = state {
            state.parts = Some([conv, scan]);
        }
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.in_proj.training_mode(mode);
        self.x_proj.training_mode(mode);
        self.out_proj.training_mode(mode);
    }
}
