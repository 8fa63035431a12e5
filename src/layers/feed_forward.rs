//! The gated feed-forward block.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{Projection, Watched, prepared::Prepared};
use crate::{
    activation::{Activation, GluOptions, glu},
    builder::builder,
    check::Check,
    dispatch::beside,
    error::Result,
};

const CHECK: Check = Check::op("GatedFeedForward");

builder! {
    /// Builder for [`GatedFeedForward`].
    GatedFeedForwardBuilder => GatedFeedForward (
        /// The size of the last axis of input and output, `D`.
        dims: i32,
        /// The size in between, `F`.
        hidden_dims: i32,
    ) {
        /// What the gate passes through: [`Activation::Silu`] by default, which makes it SwiGLU.
        activation: Activation = Activation::Silu,
        /// Whether the projections have biases; `false` by default.
        bias: bool = false,
    }
}

/// `down(act(gate(x)) · up(x))`: the feed-forward half of a decoder block.
///
/// # Shapes
/// `[..., D]` to `[..., D]`, through `[..., F]`.
///
/// # Example
/// ```
/// use mlx_primitives::{activation::Activation, layers::GatedFeedForwardBuilder};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut geglu = GatedFeedForwardBuilder::new(8, 32).activation(Activation::Gelu).build()?;
/// assert_eq!(geglu.forward(&Array::ones::<f32>(&[2, 3, 8])?)?.shape(), [2, 3, 8]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Shazeer, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202), 2020.
#[derive(Debug, Clone, ModuleParameters)]
pub struct GatedFeedForward {
    /// `[F, D]`.
    #[param]
    pub gate: Watched,
    /// `[F, D]`.
    #[param]
    pub up: Watched,
    /// `[D, F]`.
    #[param]
    pub down: Watched,
    wide: Option<Prepared<2>>,
    narrow: Option<Prepared<1>>,
    activation: Activation,
    dims: i32,
}

impl GatedFeedForward {
    /// A SwiGLU feed-forward without biases.
    ///
    /// # Errors
    /// When a size is below one.
    pub fn new(dims: i32, hidden_dims: i32) -> Result<Self> {
        Self::assemble(GatedFeedForwardBuilder::new(dims, hidden_dims))
    }

    fn assemble(builder: GatedFeedForwardBuilder) -> Result<Self> {
        let GatedFeedForwardBuilder { dims, hidden_dims, activation, bias } = builder;
        CHECK.at_least("dims", dims, 1)?;
        CHECK.at_least("hidden_dims", hidden_dims, 1)?;
        Ok(Self {
            gate: Projection::random(dims, hidden_dims, bias)?.into(),
            up: Projection::random(dims, hidden_dims, bias)?.into(),
            down: Projection::random(hidden_dims, dims, bias)?.into(),
            wide: None,
            narrow: None,
            activation,
            dims,
        })
    }

    /// From now on multiplies few rows, up to 128, by gate and up as by one matrix, and by weights that are transposed once: for
    /// inference on a GPU, where a token takes as long as the host needs for its operations.
    ///
    /// The names and values of parameters stay as they are, and they take no more memory. Whoever borrows one for writing, for
    /// instance by [`parameters_mut`](mlx_rs::module::ModuleParameters::parameters_mut), undoes it. Gate and up that differ in
    /// kind, dtype or packing stay two.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn prepare_for_inference(&mut self) -> Result<()> {
        self.wide = Prepared::of([&mut self.gate, &mut self.up])?;
        self.narrow = Prepared::of([&mut self.down])?;
        Ok(())
    }

    /// Gate and up of `[T, D]`, `[T, F]` each.
    fn widen(&mut self, rows: &Array) -> Result<[Array; 2]> {
        if let Some(both) = Prepared::product(&mut self.wide, [&self.gate, &self.up], rows)? {
            let parts = both.split_at_indices(&[self.gate.outputs()], -1)?;
            return Ok([parts[0].clone(), parts[1].clone()]);
        }
        let gate = self.gate.forward(rows)?;
        let up = beside(rows, &gate, || Ok(self.up.forward(rows)?))?;
        Ok([gate, up])
    }
}

impl Module<&Array> for GatedFeedForward {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        CHECK.last_axis_is("x", x, self.dims)?;
        let rows = if x.ndim() > 2 { x.flatten(0, -2)? } else { x.clone() };
        let [gate, up] = self.widen(&rows)?;
        let options = GluOptions { activation: self.activation, ..Default::default() };
        let gated = glu(gate, up, options)?;
        Prepared::forward(&mut self.narrow, &mut self.down, &gated)?.reshape(x.shape())
    }

    fn training_mode(&mut self, mode: bool) {
        for projection in [&mut self.gate, &mut self.up, &mut self.down] {
            projection.unchanged().training_mode(mode);
        }
    }
}
