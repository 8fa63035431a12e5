//! Status codes of MLX's C interface as `Exception`s, and errors of Rust closures carried through it.
//!
//! MLX's C functions return a status and hand the message to one handler of the process; the one they start with ends
//! the process. mlx-rs puts its own in place on its first fallible call and keeps the messages to itself, so this module
//! puts a second one in front of it, which
//!
//! - keeps the message of a call made through [`check`], for the `Exception` that [`check`] returns;
//! - passes every other message on to mlx-rs, whose own errors stay what they were;
//! - where the failure began in a Rust closure of ours ([`callback`]), passes on what that closure said instead of
//!   MLX's "returned a non-zero value". This is how an error in a gradient comes out of `mlx_rs::transforms::grad`.

use std::{
    any::Any,
    cell::Cell,
    ffi::{CStr, CString, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::Once,
};

use mlx_rs::{
    Device,
    error::{Exception, Result},
};

/// What a C function, or a closure that MLX calls, returns when all went well.
pub(super) const SUCCESS: c_int = 0;
const FAILURE: c_int = 1;

/// What MLX's C interface says of any closure that did not return [`SUCCESS`].
const CLOSURE_FAILED: &str = "returned a non-zero value";

thread_local! {
    /// Whether the innermost C call on this thread was made by [`check`].
    static OURS: Cell<bool> = const { Cell::new(false) };
    /// What MLX last said about a call made by [`check`].
    static MESSAGE: Cell<Option<String>> = const { Cell::new(None) };
    /// Why a closure of ours failed, until MLX reports that it did.
    static RAISED: Cell<Option<Exception>> = const { Cell::new(None) };
}

/// Makes one C call and turns a status other than zero into an error with MLX's message.
#[track_caller]
pub(super) fn check(call: impl FnOnce() -> c_int) -> Result<()> {
    install();
    let status = {
        let _scope = Scope::enter(true);
        call()
    };
    if status == SUCCESS {
        return Ok(());
    }
    let message = take(&MESSAGE);
    Err(take(&RAISED).unwrap_or_else(|| {
        Exception::custom(message.unwrap_or_else(|| format!("MLX failed with status {status}")))
    }))
}

/// Runs the body of a closure that MLX calls, keeping its error or panic for whoever reads the status it returns.
pub(super) fn callback(body: impl FnOnce() -> Result<()>) -> c_int {
    let _scope = Scope::enter(false);
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return SUCCESS,
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = format!("a closure called by MLX panicked: {}", panic_text(&*panic));
            discard(panic);
            Exception::custom(text)
        }
    };
    // Only a thread that is ending has no such cell; MLX's own words have to do there.
    let _ = RAISED.try_with(|raised| raised.set(Some(error)));
    FAILURE
}

/// Drops the payload of a panic, which may panic in turn.
pub(super) fn discard(panic: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(again);
    }
}

/// Puts this module's handler in front of mlx-rs's. Every raw call needs it, for without one MLX ends the process.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // mlx-rs registers its handler once, on its first fallible call: this one, if none came before. Only after it
        // can ours stay in place. Whether there is a default device does not matter here.
        drop(Device::try_default());
        // SAFETY: `on_error` lives as long as the process, never unwinds and takes no data, so there is nothing to
        // free. MLX keeps it in a plain global: a call failing on another thread at this very moment reads either
        // mlx-rs's handler or ours, and both are right for it.
        unsafe { mlx_sys::mlx_set_error_handler(Some(on_error), ptr::null_mut(), None) };
    });
}

unsafe extern "C" {
    /// The handler of mlx-rs, which keeps the message for the mlx-rs function that made the failing call.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

/// Receives MLX's message for a failing call, on the thread that made it.
extern "C" fn on_error(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a string that ends in NUL and that outlives this call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    // Whatever else MLX reports is no longer about the closure that failed.
    let raised = take(&RAISED).filter(|_| text.contains(CLOSURE_FAILED));
    if OURS.get() {
        let _ = MESSAGE.try_with(|kept| kept.set(Some(text.into_owned())));
        let _ = RAISED.try_with(|kept| kept.set(raised));
        return;
    }
    let raised = raised.and_then(|error| CString::new(error.what().replace('\0', " ")).ok());
    let message = raised.as_deref().map_or(message, CStr::as_ptr);
    // SAFETY: the symbol is mlx-rs's own handler, of the type MLX asks of any; it copies the string, which is MLX's or
    // `raised`, and both outlive the call.
    unsafe { default_mlx_error_handler(message, data) };
}

/// Who made the innermost C call on this thread, put back as it was on drop.
struct Scope(bool);

impl Scope {
    fn enter(ours: bool) -> Self {
        // Nothing is pending when a call or a closure begins; what an earlier one left behind must not be taken for
        // its failure.
        take(&RAISED);
        Self(OURS.replace(ours))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        OURS.set(self.0);
    }
}

fn take<T>(cell: &'static std::thread::LocalKey<Cell<Option<T>>>) -> Option<T> {
    cell.try_with(Cell::take).ok().flatten()
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use mlx_rs::{Array, transforms::fallible_vjp};

    use super::*;

    fn bad_matmul() -> Result<Array> {
        Array::from_int(1).matmul(Array::from_slice(&[1, 2], &[2]))
    }

    #[test]
    fn errors_of_mlx_rs_stay_what_they_were() {
        install();
        let here = bad_matmul().unwrap_err();
        let there = std::thread::spawn(bad_matmul).join().unwrap().unwrap_err();
        assert!(here.what().starts_with("[matmul]"), "{}", here.what());
        assert_eq!(here.what(), there.what());
    }

    #[test]
    fn errors_of_mlx_rs_closures_stay_what_they_were() {
        install();
        let fails = |_: &[Array]| -> Result<Vec<Array>> { Err(Exception::custom("50%s off")) };
        let one = [Array::from_f32(1.0)];
        assert_eq!(fallible_vjp(fails, &one, &one).unwrap_err().what(), "50%s off");
    }

    #[test]
    fn a_message_read_once_is_not_read_again() {
        let first = check(|| {
            // SAFETY: a null closure is one that MLX reports.
            unsafe {
                mlx_sys::mlx_closure_apply(
                    ptr::null_mut(),
                    mlx_sys::mlx_closure { ctx: ptr::null_mut() },
                    mlx_sys::mlx_vector_array { ctx: ptr::null_mut() },
                )
            }
        });
        let text = first.unwrap_err().what().to_owned();
        assert!(text.starts_with("expected a non-empty mlx_closure"), "{text}");
        assert_eq!(check(|| 3).unwrap_err().what(), "MLX failed with status 3");
    }

    #[test]
    fn what_a_closure_said_is_forgotten_once_another_call_begins() {
        assert_eq!(callback(|| Err(Exception::custom("left behind"))), FAILURE);
        assert!(bad_matmul().unwrap_err().what().starts_with("[matmul]"));
        assert_eq!(callback(|| Err(Exception::custom("left behind"))), FAILURE);
        assert_eq!(check(|| 3).unwrap_err().what(), "MLX failed with status 3");
    }
}
