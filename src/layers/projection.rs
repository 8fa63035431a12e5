//! A linear layer, dense or quantized.

use mlx_rs::{Array, error::Exception, module::Module, nn};

use super::parameters_of_variants;
use crate::{error::Result, quant::QuantizedLinear};

/// `y = x · Wᵀ + b`, with a dense weight that trains or a packed one that does not.
///
/// Layers hold projections, so that one block serves training and quantized inference alike.
///
/// # Shapes
/// `[..., I]` to `[..., O]`. A packed weight keeps the dtype of the input; a dense one is mlx-rs's own
/// layer, whose result has the wider dtype of input and weight.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Projection {
    /// mlx-rs's linear layer.
    Dense(nn::Linear),
    /// A layer over packed weights.
    Quantized(QuantizedLinear),
}

parameters_of_variants!(Projection { Dense, Quantized });

impl Projection {
    /// A dense projection with random weights.
    pub(crate) fn random(input_dims: i32, output_dims: i32, bias: bool) -> Result<Self> {
        use mlx_rs::builder::Builder;
        let linear = nn::LinearBuilder::new(input_dims, output_dims).bias(bias).build()?;
        Ok(Self::Dense(linear))
    }
}

impl From<nn::Linear> for Projection {
    fn from(linear: nn::Linear) -> Self {
        Self::Dense(linear)
    }
}

impl From<QuantizedLinear> for Projection {
    fn from(linear: QuantizedLinear) -> Self {
        Self::Quantized(linear)
    }
}

impl Module<&Array> for Projection {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense(linear) => linear.forward(x),
            Self::Quantized(linear) => linear.forward(x),
        }
    }

    fn training_mode(&mut self, mode: bool) {
        match self {
            Self::Dense(linear) => linear.training_mode(mode),
            Self::Quantized(linear) => linear.training_mode(mode),
        }
    }
}
