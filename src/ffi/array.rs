//! Arrays in and out of C calls.

use std::{ffi::c_int, mem::ManuallyDrop, ptr};

use mlx_rs::{
    Array,
    error::{Exception, Result},
};
use mlx_sys::{mlx_array, mlx_array_free};

use super::status::check;

/// The handle that stands for "no array" where MLX takes an optional one.
pub(super) const NONE: mlx_array = mlx_array { ctx: ptr::null_mut() };

/// The handle of an optional array, borrowed.
pub(super) fn optional(array: Option<&Array>) -> mlx_array {
    array.map_or(NONE, Array::as_ptr)
}

/// Makes a C call that writes one array, and takes that array.
#[track_caller]
pub(super) fn out(call: impl FnOnce(*mut mlx_array) -> c_int) -> Result<Array> {
    let mut slot = Slot(NONE);
    check(|| call(&mut slot.0))?;
    if slot.0.ctx.is_null() {
        return Err(Exception::custom("MLX reported success but wrote no array"));
    }
    let handle = ManuallyDrop::new(slot).0;
    // SAFETY: `call` reported success, so this is the new handle MLX wrote, and the slot that owned it is not dropped.
    Ok(unsafe { Array::from_ptr(handle) })
}

/// A handle that a C call is about to write, freed unless it is taken.
struct Slot(mlx_array);

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or one that MLX wrote and nobody else owns.
        unsafe { mlx_array_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use super::{super::stream, *};

    #[test]
    fn a_call_that_writes_nothing_is_an_error() {
        let error = out(|_| 0).unwrap_err();
        assert_eq!(error.what(), "MLX reported success but wrote no array");
    }

    #[test]
    fn a_status_without_a_message_is_an_error() {
        let error = out(|_| 7).unwrap_err();
        assert_eq!(error.what(), "MLX failed with status 7");
    }

    #[test]
    fn an_array_written_before_a_failure_is_freed() {
        let source = Array::from_slice(&[1.0_f32, 2.0], &[2]);
        for _ in 0..1000 {
            let error = out(|res| {
                // SAFETY: the source is alive, and `res` is the slot that `out` passes.
                unsafe { mlx_sys::mlx_array_set(res, source.as_ptr()) };
                1
            });
            assert!(error.is_err());
        }
    }

    #[test]
    fn the_error_of_a_call_is_the_message_of_mlx() {
        let (a, b) = (Array::from_int(1), Array::from_slice(&[1, 2], &[2]));
        let stream = stream::current();
        // SAFETY: the arrays and the stream are alive for the whole call.
        let error =
            out(|res| unsafe { mlx_sys::mlx_matmul(res, a.as_ptr(), b.as_ptr(), stream.as_ptr()) });
        let error = error.unwrap_err();
        assert!(error.what().starts_with("[matmul]"), "{}", error.what());
    }
}
