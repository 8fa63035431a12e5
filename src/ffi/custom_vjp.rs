//! Functions with a gradient of their own.

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    ptr,
};

use mlx_rs::{
    Array,
    error::{Exception, Result},
    ops::zeros_like,
};
use mlx_sys::{mlx_closure_custom, mlx_vector_array};

use super::{
    closure::{Closure, answer, drop_payload, payload},
    status::{callback, check},
    vector,
};

/// What a gradient may be computed from.
#[derive(Clone, Copy)]
pub(crate) struct Vjp<'a> {
    /// The inputs.
    pub(crate) primals: &'a [Array],
    /// The gradient of each output; zeros where an output was not used.
    pub(crate) cotangents: &'a [Array],
    /// The outputs, as `forward` computed them.
    pub(crate) outputs: &'a [Array],
}

/// Computes `forward(inputs)` such that `backward` gives its gradient.
///
/// `forward` runs once, at once, and returns at least one array. `backward` runs when a transform such as
/// `mlx_rs::transforms::grad` needs the gradient, and returns one gradient for each input, in their order and of their
/// shape and type. It may return them as arrays or as options: `None` stands for zeros, for an input such as a mask or
/// indices. MLX does not say which inputs need a gradient; those that do not are dropped unevaluated.
///
/// Both build graphs and neither evaluates. An error or a panic of either comes out of whichever call made it run.
///
/// - Only `inputs` have a gradient. Arrays that `forward` captures are constants, even if a gradient with respect to
///   them is asked for.
/// - The gradient of the gradient is that of what `backward` computes, so `backward` must consist of differentiable
///   operations for it. Where it uses `outputs`, those bring in this gradient again.
/// - Forward mode (`mlx_rs::transforms::jvp`) and vectorization ignore `backward`: MLX runs `forward` once more and
///   differentiates or vectorizes what it computes, which fails for custom kernels.
/// - `mlx_rs::transforms::compile::compile` traces through, gradient included.
///
/// # Errors
///
/// What `forward` returns; no output. Later, from the transform: what `backward` returns; a number, shape or type of
/// gradients that does not fit the inputs.
pub(crate) fn custom_vjp<Outputs, Gradients>(
    inputs: impl IntoIterator<Item = impl AsRef<Array>>,
    forward: impl Fn(&[Array]) -> Result<Outputs> + Send + 'static,
    backward: impl Fn(Vjp<'_>) -> Result<Gradients> + Send + 'static,
) -> Result<Vec<Array>>
where
    Outputs: IntoIterator<Item = Array>,
    Gradients: IntoIterator<Item: Into<Option<Array>>>,
{
    let forward = Closure::new(counted("custom_vjp", forward))?;
    let backward = Backward::new(move |vjp| {
        let gradients = backward(vjp)?.into_iter().map(Into::into).collect();
        fit(gradients, vjp.primals)
    })?;
    // SAFETY: both closures are alive for the whole call; the new one keeps references of its own.
    let function = Closure::out(|res| unsafe {
        mlx_sys::mlx_custom_vjp(res, forward.as_ptr(), backward.as_ptr())
    })?;
    function.call(inputs)
}

/// `function`, checked to return at least one array, and as many each time: MLX relies on both without a look.
pub(super) fn counted<Outputs>(
    name: &'static str,
    function: impl Fn(&[Array]) -> Result<Outputs> + Send + 'static,
) -> impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static
where
    Outputs: IntoIterator<Item = Array>,
{
    let expected = Cell::new(None);
    move |inputs| {
        let outputs: Vec<_> = function(inputs)?.into_iter().collect();
        let count = outputs.len();
        if count == 0 {
            let text = format!("[{name}] the function must return at least one array");
            return Err(Exception::custom(text));
        }
        match expected.replace(Some(count)) {
            Some(before) if before != count => Err(Exception::custom(format!(
                "[{name}] the function must return {before} arrays, as it did before, but got {count}"
            ))),
            _ => Ok(outputs),
        }
    }
}

/// One gradient for each input, or why these are not.
fn fit(gradients: Vec<Option<Array>>, primals: &[Array]) -> Result<Vec<Array>> {
    if gradients.len() != primals.len() {
        return Err(Exception::custom(format!(
            "[custom_vjp] backward must return {} gradients, one for each input, but got {}",
            primals.len(),
            gradients.len()
        )));
    }
    let fit_one = |(index, (gradient, primal)): (usize, (Option<Array>, &Array))| {
        let Some(gradient) = gradient else {
            return zeros_like(primal);
        };
        if gradient.shape() == primal.shape() && gradient.dtype() == primal.dtype() {
            return Ok(gradient);
        }
        Err(Exception::custom(format!(
            "[custom_vjp] gradient {index} must have shape {:?} and type {:?}, as its input has, but got {:?} and {:?}",
            primal.shape(),
            primal.dtype(),
            gradient.shape(),
            gradient.dtype()
        )))
    };
    gradients.into_iter().zip(primals).enumerate().map(fit_one).collect()
}

/// An owned `mlx_closure_custom`; see [`Closure`] for who calls and drops what it holds, and where.
pub(super) struct Backward(mlx_closure_custom);

impl Backward {
    pub(super) fn new<F>(function: F) -> Result<Self>
    where
        F: Fn(Vjp<'_>) -> Result<Vec<Array>> + Send + 'static,
    {
        let payload = payload(function);
        let mut backward = Self(mlx_closure_custom { ctx: ptr::null_mut() });
        check(|| {
            // SAFETY: `call::<F>` and `drop_payload::<F>` take the payload for what `payload` made it of, and MLX runs
            // the second exactly once, also if it cannot make the closure.
            backward.0 = unsafe {
                mlx_sys::mlx_closure_custom_new_func_payload(
                    Some(call::<F>),
                    payload,
                    Some(drop_payload::<F>),
                )
            };
            c_int::from(backward.0.ctx.is_null())
        })?;
        Ok(backward)
    }

    /// The handle, borrowed.
    pub(super) fn as_ptr(&self) -> mlx_closure_custom {
        self.0
    }
}

impl Drop for Backward {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a closure that nobody else owns.
        unsafe { mlx_sys::mlx_closure_custom_free(self.0) };
    }
}

/// What MLX calls for the gradient of a function whose `backward` has type `F`.
unsafe extern "C" fn call<F>(
    res: *mut mlx_vector_array,
    primals: mlx_vector_array,
    cotangents: mlx_vector_array,
    outputs: mlx_vector_array,
    payload: *mut c_void,
) -> c_int
where
    F: Fn(Vjp<'_>) -> Result<Vec<Array>>,
{
    callback(|| {
        // SAFETY: the payload is an `F` made by `payload`, which MLX keeps while it calls; it is only ever shared.
        let function = unsafe { &*payload.cast::<F>() };
        // SAFETY: MLX keeps its list for the duration of the call.
        let primals = &unsafe { vector::read(primals) }?;
        // SAFETY: as above.
        let cotangents = &unsafe { vector::read(cotangents) }?;
        // SAFETY: as above.
        let outputs = &unsafe { vector::read(outputs) }?;
        let vjp = Vjp { primals, cotangents, outputs };
        // SAFETY: `res` is MLX's place for one list, still empty.
        unsafe { answer(res, &function(vjp)?) }
    })
}

#[cfg(test)]
mod tests;
