//! The definition, in plain MLX ops.

use mlx_rs::{Array, Dtype};

use crate::{
    activation::{Activation, pointwise::reference::activate},
    error::Result,
};

/// `inputs` is the gate and what it scales, of one floating dtype.
pub(super) fn glu(activation: Activation, inputs: &[Array]) -> Result<Array> {
    let (gate, up) = (&inputs[0], &inputs[1]);
    let opening = activate(activation, &gate.as_dtype(Dtype::Float32)?)?;
    let y = opening.multiply(up.as_dtype(Dtype::Float32)?)?;
    Ok(y.as_dtype(gate.dtype())?)
}
