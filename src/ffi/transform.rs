//! MLX's transforms of a closure.

use std::{
    ffi::{c_int, c_void},
    ptr, slice,
};

use mlx_rs::{
    Array,
    error::{Exception, Result},
};
use mlx_sys::{mlx_closure_custom_jvp, mlx_closure_custom_vmap, mlx_vector_array, mlx_vector_int};

use super::{
    closure::{Closure, answer, drop_payload, payload},
    status::{callback, check},
    vector::{self, Vector},
};

/// The gradient of `function` at `primals`: one array for each of them.
pub(super) fn vjp(
    function: &Closure,
    primals: &[Array],
    cotangents: &[Array],
) -> Result<Vec<Array>> {
    let (primals, cotangents) = (Vector::from_arrays(primals)?, Vector::from_arrays(cotangents)?);
    let mut outputs = Vector::empty()?;
    let gradients = Vector::out(|res| {
        // SAFETY: the closure and both lists are alive; MLX replaces what the two slots hold.
        unsafe {
            mlx_sys::mlx_vjp(
                outputs.as_mut_ptr(),
                res,
                function.as_ptr(),
                primals.as_ptr(),
                cotangents.as_ptr(),
            )
        }
    })?;
    gradients.to_arrays()
}

/// The derivative of `function` at `primals` along `tangents`: one array for each output.
pub(super) fn jvp(function: &Closure, primals: &[Array], tangents: &[Array]) -> Result<Vec<Array>> {
    let (primals, tangents) = (Vector::from_arrays(primals)?, Vector::from_arrays(tangents)?);
    let mut outputs = Vector::empty()?;
    let slopes = Vector::out(|res| {
        // SAFETY: the closure and both lists are alive; MLX replaces what the two slots hold.
        unsafe {
            mlx_sys::mlx_jvp(
                outputs.as_mut_ptr(),
                res,
                function.as_ptr(),
                primals.as_ptr(),
                tangents.as_ptr(),
            )
        }
    })?;
    slopes.to_arrays()
}

/// `function` mapped over the given axis of each input, -1 for one that is shared; outputs carry the mapped axis first.
pub(super) fn vmap(function: &Closure, inputs: &[Array], axes: &[c_int]) -> Result<Vec<Array>> {
    let inputs = Vector::from_arrays(inputs)?;
    let mut traced_inputs = Vector::empty()?;
    let traced_outputs = Vector::out(|res| {
        // SAFETY: the closure, the list and the axes are alive; MLX replaces what the two slots hold.
        unsafe {
            mlx_sys::mlx_detail_vmap_trace(
                traced_inputs.as_mut_ptr(),
                res,
                function.as_ptr(),
                inputs.as_ptr(),
                axes.as_ptr(),
                axes.len(),
            )
        }
    })?;
    let first = vec![0; traced_outputs.to_arrays()?.len()];
    let outputs = Vector::out(|res| {
        // SAFETY: the lists and both slices of axes are alive for the whole call.
        unsafe {
            mlx_sys::mlx_detail_vmap_replace(
                res,
                inputs.as_ptr(),
                traced_inputs.as_ptr(),
                traced_outputs.as_ptr(),
                axes.as_ptr(),
                axes.len(),
                first.as_ptr(),
                first.len(),
            )
        }
    })?;
    outputs.to_arrays()
}

/// An owned `mlx_closure_custom_jvp`; see [`Closure`] for who calls and drops what it holds, and where.
pub(super) struct CustomJvp(mlx_closure_custom_jvp);

impl CustomJvp {
    /// `function` of the primals, the tangents and the indices of the primals that have one.
    pub(super) fn new<F>(function: F) -> Result<Self>
    where
        F: Fn(&[Array], &[Array], &[c_int]) -> Result<Vec<Array>> + Send + 'static,
    {
        let payload = payload(function);
        let mut closure = Self(mlx_closure_custom_jvp { ctx: ptr::null_mut() });
        check(|| {
            // SAFETY: `call_jvp::<F>` and `drop_payload::<F>` take the payload for what `payload` made it of, and MLX
            // runs the second exactly once, also if it cannot make the closure.
            closure.0 = unsafe {
                mlx_sys::mlx_closure_custom_jvp_new_func_payload(
                    Some(call_jvp::<F>),
                    payload,
                    Some(drop_payload::<F>),
                )
            };
            c_int::from(closure.0.ctx.is_null())
        })?;
        Ok(closure)
    }

    /// The handle, borrowed.
    pub(super) fn as_ptr(&self) -> mlx_closure_custom_jvp {
        self.0
    }
}

impl Drop for CustomJvp {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a closure that nobody else owns.
        unsafe { mlx_sys::mlx_closure_custom_jvp_free(self.0) };
    }
}

unsafe extern "C" fn call_jvp<F>(
    res: *mut mlx_vector_array,
    primals: mlx_vector_array,
    tangents: mlx_vector_array,
    indices: *const c_int,
    count: usize,
    payload: *mut c_void,
) -> c_int
where
    F: Fn(&[Array], &[Array], &[c_int]) -> Result<Vec<Array>>,
{
    callback(|| {
        // SAFETY: the payload is an `F` made by `payload`, which MLX keeps while it calls; it is only ever shared.
        let function = unsafe { &*payload.cast::<F>() };
        // SAFETY: MLX keeps its list for the duration of the call.
        let primals = unsafe { vector::read(primals) }?;
        // SAFETY: as above.
        let tangents = unsafe { vector::read(tangents) }?;
        // SAFETY: MLX passes `count` indices that it keeps for the duration of the call.
        let indices = unsafe { ints(indices, count) };
        // SAFETY: `res` is MLX's place for one list, still empty.
        unsafe { answer(res, &function(&primals, &tangents, indices)?) }
    })
}

/// An owned `mlx_closure_custom_vmap`; see [`Closure`] for who calls and drops what it holds, and where.
pub(super) struct CustomVmap(mlx_closure_custom_vmap);

impl CustomVmap {
    /// `function` of the inputs and the mapped axis of each; its outputs carry theirs first.
    pub(super) fn new<F>(function: F) -> Result<Self>
    where
        F: Fn(&[Array], &[c_int]) -> Result<Vec<Array>> + Send + 'static,
    {
        let payload = payload(function);
        let mut closure = Self(mlx_closure_custom_vmap { ctx: ptr::null_mut() });
        check(|| {
            // SAFETY: `call_vmap::<F>` and `drop_payload::<F>` take the payload for what `payload` made it of, and MLX
            // runs the second exactly once, also if it cannot make the closure.
            closure.0 = unsafe {
                mlx_sys::mlx_closure_custom_vmap_new_func_payload(
                    Some(call_vmap::<F>),
                    payload,
                    Some(drop_payload::<F>),
                )
            };
            c_int::from(closure.0.ctx.is_null())
        })?;
        Ok(closure)
    }

    /// The handle, borrowed.
    pub(super) fn as_ptr(&self) -> mlx_closure_custom_vmap {
        self.0
    }
}

impl Drop for CustomVmap {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a closure that nobody else owns.
        unsafe { mlx_sys::mlx_closure_custom_vmap_free(self.0) };
    }
}

unsafe extern "C" fn call_vmap<F>(
    res: *mut mlx_vector_array,
    out_axes: *mut mlx_vector_int,
    inputs: mlx_vector_array,
    axes: *const c_int,
    count: usize,
    payload: *mut c_void,
) -> c_int
where
    F: Fn(&[Array], &[c_int]) -> Result<Vec<Array>>,
{
    callback(|| {
        // SAFETY: the payload is an `F` made by `payload`, which MLX keeps while it calls; it is only ever shared.
        let function = unsafe { &*payload.cast::<F>() };
        // SAFETY: MLX keeps its list for the duration of the call.
        let inputs = unsafe { vector::read(inputs) }?;
        // SAFETY: MLX passes `count` axes that it keeps for the duration of the call.
        let axes = unsafe { ints(axes, count) };
        let outputs = function(&inputs, axes)?;
        let mut first = vec![0; outputs.len()];
        // SAFETY: MLX copies as many axes as it is told there are.
        let first = unsafe { mlx_sys::mlx_vector_int_new_data(first.as_mut_ptr(), first.len()) };
        if first.ctx.is_null() {
            return Err(Exception::custom("MLX could not make a list of axes"));
        }
        // SAFETY: `out_axes` is MLX's place for one list, still empty, which now owns this one.
        unsafe { *out_axes = first };
        // SAFETY: `res` is MLX's place for one list, still empty.
        unsafe { answer(res, &outputs) }
    })
}

/// The integers at `data`, which MLX leaves null where there are none.
///
/// # Safety
/// `data` must point to `count` integers that live for `'a`, if `count` is above zero.
unsafe fn ints<'a>(data: *const c_int, count: usize) -> &'a [c_int] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller vouches for the pointer.
    unsafe { slice::from_raw_parts(data, count) }
}
