//! A linear layer, dense or quantized.

use std::{collections::HashMap, ops::Range};

use mlx_rs::{
    Array,
    error::Exception,
    module::{Module, ModuleParameters},
    nn,
    ops::{addmm, concatenate, indexing::TryIndexOp, matmul},
};

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

    /// `O`, if every parameter has a row for each output, as those of a layer that was not tampered with have.
    pub(super) fn outputs(&self) -> Option<i32> {
        let parameters = self.parameters().flatten();
        let rows = |array: &Array| array.shape().first().copied();
        let outputs = rows(parameters.get("weight")?)?;
        parameters.values().all(|array| rows(array) == Some(outputs)).then_some(outputs)
    }

    /// One projection that does what `parts` do, its outputs theirs one after another; none where they differ in more than
    /// how many outputs they have.
    pub(super) fn stacked(parts: &[&Self]) -> Result<Option<Self>> {
        let [first, rest @ ..] = parts else { return Ok(None) };
        let whole_rows = parts.iter().all(|part| part.outputs().is_some());
        if !whole_rows || !rest.iter().all(|part| first.stacks_on(part)) {
            return Ok(None);
        }
        let parts: Vec<_> = parts.iter().map(|part| part.parameters().flatten()).collect();
        let mut whole = (*first).clone();
        for (name, array) in whole.parameters_mut().flatten() {
            let rows: Vec<_> = parts.iter().map(|part| part[&name]).collect();
            *array = concatenate(&rows, 0)?;
        }
        Ok(Some(whole))
    }

    /// Whether they are of one kind, and their rows of one dtype and shape.
    fn stacks_on(&self, other: &Self) -> bool {
        let alike = match (self, other) {
            (Self::Dense(_), Self::Dense(_)) => true,
            (Self::Quantized(one), Self::Quantized(other)) => one.is_packed_like(other),
            _ => false,
        };
        let rows = |projection: &Self| {
            let parameters = projection.parameters().flatten().into_iter();
            let row = |array: &Array| (array.dtype(), array.shape()[1..].to_vec());
            parameters.map(|(name, array)| (name, row(array))).collect::<HashMap<_, _>>()
        };
        alike && rows(self) == rows(other)
    }

    /// Takes these rows of `whole`, which are as its own, for its parameters.
    pub(super) fn lie_in(&mut self, whole: &Self, rows: Range<i32>) -> Result<()> {
        let whole = whole.parameters().flatten();
        for (name, array) in self.parameters_mut().flatten() {
            *array = whole[&name].try_index(rows.clone())?;
        }
        Ok(())
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

/// `x · weight + bias`.
pub(super) fn affine(
    x: &Array,
    weight: impl AsRef<Array>,
    bias: Option<&Array>,
) -> Result<Array, Exception> {
    match bias {
        None => matmul(x, weight),
        // MLX's CUDA back end divides by how many rows there are.
        Some(bias) if x.size() == 0 => matmul(x, weight)?.add(bias),
        Some(bias) => addmm(bias, x, weight, None, None),
    }
}

impl Module<&Array> for Projection {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense(linear) => affine(x, linear.weight.t(), linear.bias.value.as_ref()),
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

#[cfg(test)]
mod tests {
    use mlx_rs::Array;

    use super::*;

    #[test]
    fn no_token_has_no_output() -> Result<()> {
        for bias in [false, true] {
            let mut projection = Projection::random(3, 5, bias)?;
            for shape in [&[0, 3][..], &[2, 0, 3], &[0, 2, 2, 3]] {
                let y = projection.forward(&Array::zeros::<f32>(shape)?)?;
                y.eval()?;
                assert_eq!(y.shape(), [&shape[..shape.len() - 1], &[5]].concat(), "{bias}");
            }
        }
        Ok(())
    }
}
