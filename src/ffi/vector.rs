//! Lists of arrays in and out of C calls.

use std::{ffi::c_int, ptr};

use mlx_rs::{
    Array,
    error::{Exception, Result},
};
use mlx_sys::mlx_vector_array;

use super::{array, status::check};

/// An owned `mlx_vector_array`.
pub(super) struct Vector(mlx_vector_array);

impl Vector {
    /// A list of further references to these arrays.
    pub(super) fn from_arrays(arrays: impl IntoIterator<Item = impl AsRef<Array>>) -> Result<Self> {
        let list = Self::empty()?;
        for array in arrays {
            let array = array.as_ref();
            // SAFETY: the list and the array are alive, and the list keeps a reference of its own.
            check(|| unsafe { mlx_sys::mlx_vector_array_append_value(list.0, array.as_ptr()) })?;
        }
        Ok(list)
    }

    /// A list of nothing, for MLX to replace.
    pub(super) fn empty() -> Result<Self> {
        // SAFETY: `res` is a slot of `out`; no element is read from the null pointer.
        Self::out(|res| unsafe { mlx_sys::mlx_vector_array_set_data(res, ptr::null(), 0) })
    }

    /// Makes a C call that writes one list, and takes that list.
    #[track_caller]
    pub(super) fn out(call: impl FnOnce(*mut mlx_vector_array) -> c_int) -> Result<Self> {
        let mut vector = Self(mlx_vector_array { ctx: ptr::null_mut() });
        check(|| call(&mut vector.0))?;
        if vector.0.ctx.is_null() {
            return Err(Exception::custom("MLX reported success but wrote no list"));
        }
        Ok(vector)
    }

    /// The handle, borrowed.
    pub(super) fn as_ptr(&self) -> mlx_vector_array {
        self.0
    }

    /// The place of the handle, for a C call that replaces the list.
    pub(super) fn as_mut_ptr(&mut self) -> *mut mlx_vector_array {
        &mut self.0
    }

    /// Hands the list over to whoever receives the handle.
    pub(super) fn into_raw(self) -> mlx_vector_array {
        std::mem::ManuallyDrop::new(self).0
    }

    /// Further references to the arrays of the list.
    pub(super) fn to_arrays(&self) -> Result<Vec<Array>> {
        // SAFETY: the list is owned by `self`, so it is alive.
        unsafe { read(self.0) }
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a list that nobody else owns.
        unsafe { mlx_sys::mlx_vector_array_free(self.0) };
    }
}

/// Further references to the arrays of a borrowed list.
///
/// # Safety
///
/// `list` must be a list that stays alive and unchanged during the call.
pub(super) unsafe fn read(list: mlx_vector_array) -> Result<Vec<Array>> {
    // SAFETY: the caller keeps the list alive.
    let len = unsafe { mlx_sys::mlx_vector_array_size(list) };
    (0..len)
        .map(|index| {
            // SAFETY: the caller keeps the list alive; MLX checks the index.
            array::out(|res| unsafe { mlx_sys::mlx_vector_array_get(res, list, index) })
        })
        .collect()
}

/// The arrays of a list that must have exactly `N`, so that they can be taken apart by a pattern.
pub(crate) fn exactly<const N: usize>(arrays: Vec<Array>) -> Result<[Array; N]> {
    arrays.try_into().map_err(|all: Vec<_>| {
        Exception::custom(format!("expected {N} arrays but got {}", all.len()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use super::*;

    #[test]
    fn a_list_gives_back_the_arrays_it_was_made_of() {
        let arrays = [Array::from_int(3), Array::from_slice(&[1.5_f32, 2.5], &[2])];
        let list = Vector::from_arrays(&arrays).unwrap();
        let [first, second] = exactly(list.to_arrays().unwrap()).unwrap();
        drop(list);
        drop(arrays);
        assert_eq!(first.item_exact::<i32>(), 3);
        assert_eq!(second.shape(), [2]);
    }

    #[test]
    fn an_empty_list_is_a_list() {
        assert!(Vector::from_arrays(Vec::<Array>::new()).unwrap().to_arrays().unwrap().is_empty());
    }

    #[test]
    fn a_call_that_writes_no_list_is_an_error() {
        assert!(Vector::out(|_| 0).is_err());
    }

    #[test]
    fn exactly_says_how_many_there_were() {
        let error = exactly::<2>(vec![Array::from_int(1)]).unwrap_err();
        assert_eq!(error.what(), "expected 2 arrays but got 1");
    }
}
