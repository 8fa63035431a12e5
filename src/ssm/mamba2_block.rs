//! The block of Mamba-2: a short convolution, a scan of heads and a gated norm between two projections.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::{indexing::TryIndexOp, ones, zeros},
    random::uniform,
};

use super::{MambaInput, MambaState, step_range};
use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
    layers::Projection,
    norm::{GatedRmsNorm, GatedRmsNormBuilder},
    scan::{
        CausalConv1d, CausalConv1dBuilder, SsdInput, SsdOptions, SsdStep, ssd_scan_with_state,
        ssd_step,
    },
};

const CHECK: Check = Check::op("Mamba2Block");

/// How fast heads may decay to start with, as in the paper's code.
const DECAYS: (f32, f32) = (1.0, 16.0);

builder! {
    /// Builder for [`Mamba2Block`].
    Mamba2BlockBuilder => Mamba2Block (
        /// The size of the last axis of input and output.
        dims: i32,
    ) {
        /// Columns of a head's state, `N`; [`Mamba2Block::DEFAULT_D_STATE`] by default.
        d_state: i32 = Mamba2Block::DEFAULT_D_STATE,
        /// Steps that the convolution sees; [`Mamba2Block::DEFAULT_D_CONV`] by default.
        d_conv: i32 = Mamba2Block::DEFAULT_D_CONV,
        /// Channels inside for each of `dims`; [`Mamba2Block::DEFAULT_EXPAND`] by default.
        expand: i32 = Mamba2Block::DEFAULT_EXPAND,
        /// Channels of a head, `P`, which divides those inside; [`Mamba2Block::DEFAULT_HEAD_DIM`] by default.
        head_dim: i32 = Mamba2Block::DEFAULT_HEAD_DIM,
        /// Groups of heads that share what enters and leaves their states, and of channels that are normalized together;
        /// [`Mamba2Block::DEFAULT_N_GROUPS`] by default.
        n_groups: i32 = Mamba2Block::DEFAULT_N_GROUPS,
        /// See [`SsdOptions::chunk_size`]; [`SsdOptions::DEFAULT_CHUNK_SIZE`] by default.
        chunk_size: i32 = SsdOptions::DEFAULT_CHUNK_SIZE,
        /// The step sizes to start with, smallest and largest; [`Mamba2Block::DEFAULT_DT_RANGE`] by default.
        dt_range: (f32, f32) = Mamba2Block::DEFAULT_DT_RANGE,
        /// Whether the convolution has a bias; `true` by default.
        conv_bias: bool = true,
        /// Whether the projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// A state-space layer of heads: the mixer of Mamba-2, under the parameter names of `mamba_ssm`'s `Mamba2`.
///
/// ```text
/// z, xbc, dt = in_proj(input), split
/// x, b, c    = silu(conv1d(xbc)), split
/// y          = ssd_scan(x, softplus(dt + dt_bias), −exp(A_log), b, c, D)
/// output     = out_proj(norm(y · silu(z)))
/// ```
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::ssm::{Mamba2Block, MambaState};
/// use mlx_rs::{Array, module::Module};
///
/// let mut block = Mamba2Block::new(64)?;
/// let mut state = MambaState::default();
/// block.forward((&Array::ones::<f32>(&[1, 10, 64])?, &mut state))?;
/// let y = block.step(Array::ones::<f32>(&[1, 64])?, &mut state)?;
/// assert_eq!(y.shape(), [1, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Dao and Gu, [Transformers are SSMs](https://arxiv.org/abs/2405.21060), 2024.
#[derive(Debug, Clone, ModuleParameters)]
#[allow(
    non_snake_case,
    reason = "parameters are named as in mamba_ssm, so that its checkpoints load"
)]
pub struct Mamba2Block {
    /// `dims` to twice the channels inside, twice `n_groups · d_state`, and the heads.
    #[param]
    pub in_proj: Projection,
    /// Over the channels inside, and what enters and leaves the states.
    #[param]
    pub conv1d: CausalConv1d,
    /// `[heads]`: added to step sizes, in f32.
    #[param]
    pub dt_bias: Param<Array>,
    /// `[heads]`: the logarithm of how fast each decays.
    #[param]
    pub A_log: Param<Array>,
    /// `[heads]`: how much is added of the input.
    #[param]
    pub D: Param<Array>,
    /// Over the channels inside, gated before, each group by itself.
    #[param]
    pub norm: GatedRmsNorm,
    /// The channels inside to `dims`.
    #[param]
    pub out_proj: Projection,
    /// See [`SsdOptions::chunk_size`].
    pub chunk_size: i32,
    sizes: Sizes,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    dims: i32,
    heads: i32,
    head_dim: i32,
    groups: i32,
    states: i32,
}

impl Sizes {
    fn new(builder: &Mamba2BlockBuilder) -> Result<Self> {
        let &Mamba2BlockBuilder { dims, d_state, d_conv, expand, head_dim, n_groups, .. } = builder;
        for (name, size) in [
            ("dims", dims),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("expand", expand),
            ("head_dim", head_dim),
            ("n_groups", n_groups),
            ("chunk_size", builder.chunk_size),
        ] {
            CHECK.at_least(name, size, 1)?;
        }
        let inner = dims.checked_mul(expand);
        let inner = CHECK.known(inner, "expand", "leave dims · expand below 2^31", expand)?;
        let divides = inner % head_dim == 0;
        CHECK.value(
            divides,
            "head_dim",
            format_args!("divide dims · expand = {inner}"),
            head_dim,
        )?;
        let heads = inner / head_dim;
        let divides = heads % n_groups == 0;
        CHECK.value(divides, "n_groups", format_args!("divide the {heads} heads"), n_groups)?;
        Ok(Self { dims, heads, head_dim, groups: n_groups, states: d_state })
    }

    /// Channels inside.
    fn inner(self) -> i32 {
        self.heads * self.head_dim
    }

    /// What is convolved.
    fn mixed(self) -> i32 {
        self.inner() + 2 * self.groups * self.states
    }

    /// What is convolved, a gate and step sizes, where that is below 2^31.
    fn projected(self) -> Option<i32> {
        let shared = self.groups.checked_mul(self.states)?;
        shared.checked_add(self.inner())?.checked_mul(2)?.checked_add(self.heads)
    }
}

impl Mamba2Block {
    /// The default of [`Mamba2BlockBuilder::d_state`].
    pub const DEFAULT_D_STATE: i32 = 128;

    /// The default of [`Mamba2BlockBuilder::d_conv`].
    pub const DEFAULT_D_CONV: i32 = 4;

    /// The default of [`Mamba2BlockBuilder::expand`].
    pub const DEFAULT_EXPAND: i32 = 2;

    /// The default of [`Mamba2BlockBuilder::head_dim`].
    pub const DEFAULT_HEAD_DIM: i32 = 64;

    /// The default of [`Mamba2BlockBuilder::n_groups`].
    pub const DEFAULT_N_GROUPS: i32 = 1;

    /// The default of [`Mamba2BlockBuilder::dt_range`].
    pub const DEFAULT_DT_RANGE: (f32, f32) = step_range::DEFAULT;

    /// A block with the sizes of the paper.
    ///
    /// # Errors
    /// When `dims` is below one, or twice `dims` no multiple of [`Mamba2Block::DEFAULT_HEAD_DIM`].
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(Mamba2BlockBuilder::new(dims))
    }

    fn assemble(builder: Mamba2BlockBuilder) -> Result<Self> {
        let sizes = Sizes::new(&builder)?;
        let range = step_range::check(CHECK, builder.dt_range)?;
        let expected = "leave what is projected below 2^31 numbers";
        let projected = CHECK.known(sizes.projected(), "d_state", expected, sizes.states)?;
        let Mamba2BlockBuilder { dims, d_conv, conv_bias, bias, chunk_size, .. } = builder;
        let (inner, heads, mixed) = (sizes.inner(), sizes.heads, sizes.mixed());
        let decays = uniform::<_, f32>(DECAYS.0, DECAYS.1, &[heads], None)?;
        use mlx_rs::builder::Builder;
        Ok(Self {
            in_proj: Projection::random(dims, projected, bias)?,
            conv1d: CausalConv1dBuilder::new(mixed, d_conv).bias(conv_bias).silu(true).build()?,
            dt_bias: Param::new(step_range::bias(heads, range)?),
            A_log: Param::new(decays.log()?),
            D: Param::new(ones::<f32>(&[heads])?),
            norm: GatedRmsNormBuilder::new(inner).group_size(inner / sizes.groups).build()?,
            out_proj: Projection::random(inner, dims, bias)?,
            chunk_size,
            sizes,
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
        CHECK.shape("x", x, axes!["B", self.sizes.dims])?;
        let [z, mixed, dt] = self.projected(&x.expand_dims(1)?)?;
        let (mixed, conv) = self.conv1d.with_state(&mixed, state.conv())?;
        let [x, b, c] = self.in_heads(&mixed)?;
        let [z, dt, x, b, c] = [z, dt, x, b, c].map(|array| array.squeeze_axes(&[1]));
        let (x, rates) = (x?, self.rates()?);
        let started = match state.scan() {
            Some(scan) => scan.clone(),
            None => {
                let Sizes { heads, head_dim, states, .. } = self.sizes;
                zeros::<f32>(&[x.dim(0), heads, head_dim, states])?
            }
        };
        let input = SsdStep { x: &x, dt: &dt?, a: &rates, b: &b?, c: &c? };
        let (y, scan) = ssd_step(started, input, self.options(None))?;
        let y = self.finished(&y, &z?)?;
        state.parts = Some([conv, scan]);
        Ok(y)
    }

    /// The gate, what is convolved, and the step sizes but for their bias.
    fn projected(&mut self, x: &Array) -> Result<[Array; 3]> {
        let all = self.in_proj.forward(x)?;
        let inner = self.sizes.inner();
        let steps = inner + self.sizes.mixed();
        Ok([
            all.try_index((.., .., ..inner))?,
            all.try_index((.., .., inner..steps))?,
            all.try_index((.., .., steps..))?,
        ])
    }

    /// Of the convolved: what goes through the scan, `[B, L, H, P]`, and what enters and leaves the states, `[B, L, G, N]`.
    fn in_heads(&self, mixed: &Array) -> Result<[Array; 3]> {
        let Sizes { heads, head_dim, groups, states, .. } = self.sizes;
        let (inner, shared) = (self.sizes.inner(), groups * states);
        let part = |from: i32, [count, size]: [i32; 2]| -> Result<Array> {
            let part = mixed.try_index((.., .., from..from + count * size))?;
            Ok(part.reshape(&[mixed.dim(0), mixed.dim(1), count, size])?)
        };
        Ok([
            part(0, [heads, head_dim])?,
            part(inner, [groups, states])?,
            part(inner + shared, [groups, states])?,
        ])
    }

    /// `a` of the scan.
    fn rates(&self) -> Result<Array> {
        Ok(self.A_log.as_dtype(Dtype::Float32)?.exp()?.negative()?)
    }

    fn options<'a>(&'a self, initial_state: Option<&'a Array>) -> SsdOptions<'a> {
        SsdOptions {
            chunk_size: self.chunk_size,
            d: Some(&self.D),
            dt_bias: Some(&self.dt_bias),
            dt_softplus: true,
            initial_state,
            ..Default::default()
        }
    }

    /// The output for what was scanned, `[..., H, P]`, and the gate.
    fn finished(&mut self, y: &Array, z: &Array) -> Result<Array> {
        let normed = self.norm.forward((&y.reshape(z.shape())?, z))?;
        Ok(self.out_proj.forward(&normed)?)
    }
}

impl<'a, I: Into<MambaInput<'a>>> Module<I> for Mamba2Block {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let MambaInput { x, state } = input.into();
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", "L", self.sizes.dims])?;
        let [z, mixed, dt] = self.projected(x)?;
        let before = state.as_deref();
        let conv = before.and_then(MambaState::conv);
        let (mixed, conv) = self.conv1d.with_state(&mixed, conv)?;
        let [x, b, c] = self.in_heads(&mixed)?;
        let input = SsdInput { x: &x, dt: &dt, a: &self.rates()?, b: &b, c: &c };
        let options = self.options(before.and_then(MambaState::scan));
        let (y, scan) = ssd_scan_with_state(input, options)?;
        let y = self.finished(&y, &z)?;
        if let Some(state) = state {
            state.parts = Some([conv, scan]);
        }
        Ok(y)
    }

    fn training_mode(&mut self, mode: bool) {
        self.in_proj.training_mode(mode);
        self.out_proj.training_mode(mode);
    }
}
