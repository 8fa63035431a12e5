//! Kernels that MLX can transform.

use mlx_rs::{Array, Dtype, error::Exception, stop_gradient};

use super::inference;
use crate::{
    error::Result,
    ffi::{self, exactly},
};

/// What a gradient is computed from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vjp<'a, const N: usize, const M: usize> {
    /// The inputs.
    pub(crate) inputs: &'a [Array; N],
    /// The outputs, as the forward kernel computed them.
    pub(crate) outputs: &'a [Array; M],
    /// The gradient of each output; zeros where one was not used.
    pub(crate) cotangents: &'a [Array; M],
}

/// Computes `forward(inputs)` by kernels, with a gradient by kernels, and every other transform by `reference`.
///
/// `backward` returns one gradient for each input, of its shape and dtype. All three are functions of the arrays alone:
/// what else they need, they copy.
pub(crate) fn differentiable<const N: usize, const M: usize>(
    inputs: [&Array; N],
    forward: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + 'static,
    backward: impl Fn(Vjp<'_, N, M>) -> Result<[Array; N]> + Send + Clone + 'static,
    reference: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + Clone + 'static,
) -> Result<[Array; M]> {
    let backward = move |vjp: ffi::Vjp<'_>| -> Result<Vec<Array>, Exception> {
        let vjp = Vjp {
            inputs: all(vjp.primals)?,
            outputs: all(vjp.outputs)?,
            cotangents: all(vjp.cotangents)?,
        };
        Ok(backward(vjp)?.into())
    };
    run(inputs, forward, Some(backward), reference)
}

/// [`differentiable`], with the gradient of `reference`.
pub(crate) fn differentiable_by_reference<const N: usize, const M: usize>(
    inputs: [&Array; N],
    forward: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + 'static,
    reference: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + Clone + 'static,
) -> Result<[Array; M]> {
    run(inputs, forward, None::<fn(ffi::Vjp<'_>) -> Result<Vec<Array>, Exception>>, reference)
}

fn run<const N: usize, const M: usize>(
    inputs: [&Array; N],
    forward: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + 'static,
    backward: Option<
        impl Fn(ffi::Vjp<'_>) -> Result<Vec<Array>, Exception> + Send + Clone + 'static,
    >,
    reference: impl Fn(&[Array; N]) -> Result<[Array; M]> + Send + Clone + 'static,
) -> Result<[Array; M]> {
    if inference::is_on() {
        return forward(&inputs.map(Array::clone));
    }
    let outputs = ffi::accelerated(
        &inputs.map(Array::clone),
        move |inputs| Ok(forward(all(inputs)?)?.into()),
        backward,
        move |inputs| Ok(reference(all(&without_traces_of_integers(inputs)?)?)?.into()),
    )?;
    Ok(exactly(outputs)?)
}

/// The inputs of a reference. MLX traces integers too, and where one leads to an index it throws: it has no gradient of that, not
/// even zero.
fn without_traces_of_integers(inputs: &[Array]) -> Result<Vec<Array>, Exception> {
    let cut = |input: &Array| match input.dtype() {
        Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16 | Dtype::Complex64 => Ok(input.clone()),
        _ => stop_gradient(input),
    };
    inputs.iter().map(cut).collect()
}

fn all<const N: usize>(arrays: &[Array]) -> Result<&[Array; N], Exception> {
    arrays
        .try_into()
        .map_err(|_| Exception::custom(format!("expected {N} arrays but got {}", arrays.len())))
}
