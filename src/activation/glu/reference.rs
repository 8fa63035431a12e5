//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype};

use crate::{
    activation::{Activation, pointwise::reference::activate},
    error::Result,
};

/// `inputs` is the gate and what it scales, of one floating dtype, then the biases of both or of neither.
pub(super) fn glu(activation: Activation, inputs: &[Array]) -> Result<Array> {
    let (gate, up) = (&inputs[0], &inputs[1]);
    let opening = activate(activation, &biased(gate, inputs.get(2))?)?;
    let y = opening.multiply(biased(up, inputs.get(3))?)?;
    Ok(y.as_dtype(gate.dtype())?)
}

/// In f32.
fn biased(x: &Array, bias: Option<&Array>) -> Result<Array> {
    let x = x.as_dtype(Dtype::Float32)?;
    match bias {
        Some(bias) => Ok(x.add(bias.as_dtype(Dtype::Float32)?)?),
        None => Ok(x),
    }
}
