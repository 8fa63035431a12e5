//! Rust closures that MLX can call.

use std::{
    ffi::{c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

use mlx_rs::{
    Array,
    error::{Exception, Result},
};
use mlx_sys::{mlx_closure, mlx_vector_array};

use super::{
    status::{callback, check, discard},
    vector::{self, Vector},
};

/// An owned `mlx_closure`: a function from arrays to arrays.
///
/// MLX keeps what it needs of the Rust closure for as long as some graph refers to it, and drops it on whichever thread
/// lets go last, which may be one that evaluates: hence `Send` and `'static`. It calls the closure only inside the
/// transform that asks for it, so never twice at once, and `Sync` (which no closure over an `Array` is) is not needed.
pub(super) struct Closure(mlx_closure);

impl Closure {
    pub(super) fn new<F>(function: F) -> Result<Self>
    where
        F: Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    {
        let payload = payload(function);
        Self::out(|res| {
            // SAFETY: `call::<F>` and `drop_payload::<F>` take the payload for what `payload` made it of, and MLX runs
            // the second exactly once, also if it cannot make the closure.
            let closure = unsafe {
                mlx_sys::mlx_closure_new_func_payload(
                    Some(call::<F>),
                    payload,
                    Some(drop_payload::<F>),
                )
            };
            // SAFETY: `res` is the slot that `out` passes.
            unsafe { *res = closure };
            c_int::from(closure.ctx.is_null())
        })
    }

    /// Makes a C call that writes one closure, and takes that closure.
    #[track_caller]
    pub(super) fn out(call: impl FnOnce(*mut mlx_closure) -> c_int) -> Result<Self> {
        let mut closure = Self(mlx_closure { ctx: ptr::null_mut() });
        check(|| call(&mut closure.0))?;
        if closure.0.ctx.is_null() {
            return Err(Exception::custom("MLX reported success but wrote no closure"));
        }
        Ok(closure)
    }

    /// Calls the closure.
    pub(super) fn call(
        &self,
        inputs: impl IntoIterator<Item = impl AsRef<Array>>,
    ) -> Result<Vec<Array>> {
        let inputs = Vector::from_arrays(inputs)?;
        // SAFETY: the closure and the list are alive for the whole call.
        let outputs =
            Vector::out(|res| unsafe { mlx_sys::mlx_closure_apply(res, self.0, inputs.as_ptr()) })?;
        outputs.to_arrays()
    }

    /// The handle, borrowed.
    pub(super) fn as_ptr(&self) -> mlx_closure {
        self.0
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a closure that nobody else owns.
        unsafe { mlx_sys::mlx_closure_free(self.0) };
    }
}

/// What MLX calls for a closure of type `F`.
unsafe extern "C" fn call<F>(
    res: *mut mlx_vector_array,
    inputs: mlx_vector_array,
    payload: *mut c_void,
) -> c_int
where
    F: Fn(&[Array]) -> Result<Vec<Array>>,
{
    callback(|| {
        // SAFETY: the payload is an `F` made by `payload`, which MLX keeps while it calls; it is only ever shared.
        let function = unsafe { &*payload.cast::<F>() };
        // SAFETY: MLX keeps its list for the duration of the call.
        let inputs = unsafe { vector::read(inputs) }?;
        // SAFETY: `res` is MLX's place for one list, still empty.
        unsafe { answer(res, &function(&inputs)?) }
    })
}

/// Writes what a closure returned where MLX expects it.
///
/// # Safety
///
/// `res` must be a place for one list that owns nothing yet.
pub(super) unsafe fn answer(res: *mut mlx_vector_array, arrays: &[Array]) -> Result<()> {
    let list = Vector::from_arrays(arrays)?.into_raw();
    // SAFETY: the caller passes a place for a list.
    unsafe { *res = list };
    Ok(())
}

/// Moves a closure to the heap, for MLX to own.
pub(super) fn payload<F: Send + 'static>(function: F) -> *mut c_void {
    Box::into_raw(Box::new(function)).cast()
}

/// What MLX calls when it needs a closure of type `F` no longer.
pub(super) unsafe extern "C" fn drop_payload<F>(payload: *mut c_void) {
    let dropped = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `payload` made it of a box of `F`, and MLX lets go of it once.
        drop(unsafe { Box::from_raw(payload.cast::<F>()) });
    }));
    if let Err(panic) = dropped {
        discard(panic);
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a failed step fails the test, and closures that panic are what is tested"
    )]

    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// Counts the drops of its clones.
    #[derive(Clone)]
    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn two() -> Vec<Array> {
        vec![Array::from_f32(2.0), Array::from_f32(3.0)]
    }

    fn error_of(function: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static) -> String {
        let error = Closure::new(function).unwrap().call(two()).unwrap_err();
        error.what().to_owned()
    }

    #[test]
    fn arrays_go_in_and_come_out() {
        let closure = Closure::new(|x| Ok(vec![x[0].multiply(&x[1])?, x[1].clone()])).unwrap();
        for _ in 0..3 {
            let outputs = closure.call(two()).unwrap();
            let values: Vec<f32> = outputs.iter().map(Array::item_exact::<f32>).collect();
            assert_eq!(values, [6.0, 3.0]);
        }
        let closure = Closure::new(|x| Ok(x.to_vec())).unwrap();
        assert!(closure.call(Vec::<Array>::new()).unwrap().is_empty());
    }

    #[test]
    fn an_error_comes_out_as_it_went_in() {
        let text = "100% of \"x\"\nis wrong, é: %s %n";
        assert_eq!(error_of(move |_| Err(Exception::custom(text))), text);
    }

    #[test]
    fn an_error_of_mlx_inside_comes_out_with_its_message() {
        let text = error_of(|x| Ok(vec![x[0].reshape(&[7])?]));
        assert!(text.starts_with("[reshape]"), "{text}");
    }

    #[test]
    fn a_panic_is_an_error() {
        let message = "a closure called by MLX panicked: ";
        assert_eq!(error_of(|_| panic!("fixed")), format!("{message}fixed"));
        assert_eq!(error_of(|x| panic!("made of {}", x.len())), format!("{message}made of 2"));
        assert_eq!(error_of(|_| std::panic::panic_any(7)), format!("{message}no message"));
    }

    #[test]
    fn a_panic_with_a_payload_that_panics_is_an_error() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert!(error_of(|_| std::panic::panic_any(Bomb)).ends_with("no message"));
        let bomb = Bomb;
        let closure = Closure::new(move |x| {
            let _ = &bomb;
            Ok(x.to_vec())
        });
        assert_eq!(closure.unwrap().call(two()).unwrap().len(), 2);
    }

    #[test]
    fn closures_nest() {
        let inner = |x: &[Array]| Closure::new(|x| Ok(vec![x[0].add(&x[1])?]))?.call(x);
        let closure = Closure::new(move |x| {
            let sum = inner(x)?;
            inner(&[sum[0].clone(), sum[0].clone()])
        });
        let outputs = closure.unwrap().call(two()).unwrap();
        assert_eq!(outputs[0].item_exact::<f32>(), 10.0);
    }

    #[test]
    fn an_inner_error_comes_out_of_the_outer_call() {
        let text = error_of(|x| Closure::new(|_| Err(Exception::custom("deep")))?.call(x));
        assert_eq!(text, "deep");
    }

    #[test]
    fn an_inner_error_may_be_handled() {
        let fails = |x: &[Array]| Closure::new(|_| Err(Exception::custom("handled")))?.call(x);
        let closure = Closure::new(move |x| {
            assert_eq!(fails(x).unwrap_err().what(), "handled");
            Ok(x.to_vec())
        });
        assert_eq!(closure.unwrap().call(two()).unwrap().len(), 2);
        let text = error_of(move |x| fails(x).map_err(|_| Exception::custom("instead")));
        assert_eq!(text, "instead");
    }

    #[test]
    fn every_payload_is_dropped_once() {
        let drops = Arc::new(AtomicUsize::new(0));
        for round in 0..300 {
            let counted = Counted(drops.clone());
            let closure = Closure::new(move |x| match (&counted, round % 3) {
                (_, 0) => Ok(x.to_vec()),
                (_, 1) => Err(Exception::custom("no")),
                _ => panic!("no"),
            });
            let closure = closure.unwrap();
            let outcome = closure.call(two());
            assert_eq!(outcome.is_ok(), round % 3 == 0);
            assert_eq!(drops.load(Ordering::SeqCst), round);
            drop(closure);
            assert_eq!(drops.load(Ordering::SeqCst), round + 1);
        }
    }
}
