//! The gated feed-forward block.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{Projection, WatchedProjection, prepared::Prepared};
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
    pub gate: WatchedProjection,
    /// `[F, D]`.
    #[param]
    pub up: WatchedProjection,
    /// `[D, F]`.
    #[param]
    pub down: WatchedProjection,
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

    /// Prepares the projections for inference, as [`Attention::prepare_for_inference`](super::Attention::prepare_for_inference)
    /// does; gate and up are the ones that are multiplied as one.
    ///
    /// # Errors
    /// When MLX fails.
    pub fn prepare_for_inference(&mut self) -> Result<()> {
        self.narrow = Prepared::of([&mut self.down])?;
        self.wide = match self.gate.outputs() == self.up.outputs() {
            true => Prepared::of([&mut self.gate, &mut self.up])?,
            false => None,
        };
        Ok(())
    }

    /// Gate and up of `[T, D]`, `[T, F]` each.
    fn widen(&mut self, rows: &Array) -> Result<[Array; 2]> {
        if let Some(both) = Prepared::product(&mut self.wide, [&self.gate, &self.up], rows)? {
            // MLX multiplies a row of its own as it is, and copies one that lies within another.
            let halves = match both.dim(0) {
                1 => both.reshape(&[2, -1])?.split_equal(2, 0)?,
                _ => both.split_equal(2, -1)?,
            };
            return Ok([halves[0].clone(), halves[1].clone()]);
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
            projection.training_mode(mode);
        }
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::random::{key, normal};

    use super::*;

    #[test]
    fn prepared_it_says_the_same_of_one_row_and_of_several() -> Result<()> {
        let mut feed_forward = GatedFeedForward::new(64, 32)?;
        let mut prepared = feed_forward.clone();
        prepared.prepare_for_inference()?;
        for rows in [1, 2, 3] {
            let x = normal::<f32>(&[rows, 64], None, None, &key(7)?)?;
            let [found, expected] = [prepared.forward(&x)?, feed_forward.forward(&x)?];
            assert!(prepared.wide.is_some());
            assert!(found.all_close(expected, 1e-5, 1e-5, None)?, "{rows} rows");
        }
        Ok(())
    }

    #[test]
    fn gate_and_up_of_one_size_are_prepared() -> Result<()> {
        let x = Array::ones::<f32>(&[3, 64])?;
        let mut feed_forward = GatedFeedForward::new(64, 32)?;
        feed_forward.prepare_for_inference()?;
        feed_forward.forward(&x)?;
        assert!(feed_forward.wide.is_some() && feed_forward.narrow.is_some());

        feed_forward.up = Projection::random(64, 16, false)?.into();
        feed_forward.prepare_for_inference()?;
        assert!(feed_forward.wide.is_none() && feed_forward.forward(&x).is_err());
        Ok(())
    }
}
