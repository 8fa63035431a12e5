//! Functions that every transform sees as another one.

use std::ffi::c_int;

use mlx_rs::{Array, error::Result, stop_gradient};

use super::{
    closure::Closure,
    custom_vjp::{Backward, Vjp, counted},
    transform::{self, CustomJvp, CustomVmap},
};

/// Computes `fast(inputs)`, which is `reference(inputs)` by other means, such that MLX can transform it.
///
/// MLX knows neither the gradient of a custom kernel nor how to vectorize one. So
/// - the gradient is what `backward` computes, or where there is none that of `reference`;
/// - the derivative in forward mode, vectorization, and every gradient of a gradient are those of `reference`.
///
/// `backward` returns one gradient for each input, of its shape and type. All three build graphs and evaluate nothing;
/// they run again whenever a transform does, so they must compute the same each time.
///
/// # Errors
/// What `fast` returns; no output. Later, from a transform: what `backward` or `reference` returns.
pub(crate) fn accelerated<Fast, Back, Ref>(
    inputs: &[Array],
    fast: Fast,
    backward: Option<Back>,
    reference: Ref,
) -> Result<Vec<Array>>
where
    Fast: Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    Back: Fn(Vjp<'_>) -> Result<Vec<Array>> + Send + Clone + 'static,
    Ref: Fn(&[Array]) -> Result<Vec<Array>> + Send + Clone + 'static,
{
    let gradient = {
        let reference = reference.clone();
        Backward::new(move |vjp| match &backward {
            Some(backward) => accelerated_gradient(vjp, backward.clone(), reference.clone()),
            None => gradient_of(reference.clone(), vjp.primals, vjp.cotangents),
        })?
    };
    substitute(inputs, fast, &gradient, reference)
}

/// The gradient by `backward`, with that of `reference` for whoever transforms it in turn.
fn accelerated_gradient<Back, Ref>(
    vjp: Vjp<'_>,
    backward: Back,
    reference: Ref,
) -> Result<Vec<Array>>
where
    Back: Fn(Vjp<'_>) -> Result<Vec<Array>> + Send + 'static,
    Ref: Fn(&[Array]) -> Result<Vec<Array>> + Send + Clone + 'static,
{
    let (primals, cotangents) = (vjp.primals.len(), vjp.cotangents.len());
    let parts = move |all: &[Array]| {
        let (before, outputs) = all.split_at(primals + cotangents);
        let (primals, cotangents) = before.split_at(primals);
        (primals.to_vec(), cotangents.to_vec(), outputs.to_vec())
    };
    let fast = move |all: &[Array]| {
        let (primals, cotangents, outputs) = parts(all);
        backward(Vjp { primals: &primals, cotangents: &cotangents, outputs: &outputs })
    };
    let slow = move |all: &[Array]| {
        let (primals, cotangents, _) = parts(all);
        let gradients = gradient_of(reference.clone(), &primals, &cotangents)?;
        gradients.iter().map(renamed).collect()
    };
    let again = {
        let slow = slow.clone();
        Backward::new(move |vjp| gradient_of(slow.clone(), vjp.primals, vjp.cotangents))?
    };
    let all: Vec<_> = [vjp.primals, vjp.cotangents, vjp.outputs].concat();
    substitute(&all, fast, &again, slow)
}

/// `fast(inputs)` with this gradient, and the other transforms of `reference`.
fn substitute<Fast, Ref>(
    inputs: &[Array],
    fast: Fast,
    gradient: &Backward,
    reference: Ref,
) -> Result<Vec<Array>>
where
    Fast: Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    Ref: Fn(&[Array]) -> Result<Vec<Array>> + Send + Clone + 'static,
{
    // MLX derives in forward mode whatever the outputs hang by, before it asks whether someone stands in for it.
    let fast = move |inputs: &[Array]| {
        let cut = inputs.iter().map(stop_gradient).collect::<Result<Vec<_>>>()?;
        fast(&cut)
    };
    let fast = Closure::new(counted("accelerated", fast))?;
    let derivative = {
        let reference = reference.clone();
        CustomJvp::new(move |primals, tangents, indices| {
            derivative_of(reference.clone(), primals, tangents, indices)
        })?
    };
    let mapped = CustomVmap::new(move |inputs, axes| {
        transform::vmap(&Closure::new(reference.clone())?, inputs, axes)
    })?;
    // SAFETY: all four closures are alive for the whole call; the new one keeps references of its own.
    let function = Closure::out(|res| unsafe {
        mlx_sys::mlx_custom_function(
            res,
            fast.as_ptr(),
            gradient.as_ptr(),
            derivative.as_ptr(),
            mapped.as_ptr(),
        )
    })?;
    function.call(inputs)
}

/// The same as another array to MLX, which tells the results of a function it transforms by which arrays they are: those of a
/// sum's arguments are one, and of two cotangents for it only one would count.
fn renamed(array: &Array) -> Result<Array> {
    array.expand_dims(0)?.squeeze_axes(&[0])
}

fn gradient_of(
    function: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    primals: &[Array],
    cotangents: &[Array],
) -> Result<Vec<Array>> {
    transform::vjp(&Closure::new(function)?, primals, cotangents)
}

/// The derivative along the `tangents` of the primals at `indices`; the others stay as they are.
fn derivative_of(
    function: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    primals: &[Array],
    tangents: &[Array],
    indices: &[c_int],
) -> Result<Vec<Array>> {
    let indices: Vec<_> = indices.iter().filter_map(|&index| usize::try_from(index).ok()).collect();
    let moving: Vec<_> = indices.iter().filter_map(|&index| primals.get(index).cloned()).collect();
    let primals = primals.to_vec();
    let function = Closure::new(move |moved: &[Array]| {
        let mut all = primals.clone();
        for (&index, array) in indices.iter().zip(moved) {
            if let Some(primal) = all.get_mut(index) {
                *primal = array.clone();
            }
        }
        function(&all)
    })?;
    transform::jvp(&function, &moving, tangents)
}

#[cfg(test)]
mod tests;
