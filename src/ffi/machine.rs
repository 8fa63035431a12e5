//! What MLX is and what it runs on.

use std::{
    ffi::{CStr, c_char},
    ptr,
};

use mlx_rs::error::{Exception, Result};
use mlx_sys::{mlx_device, mlx_device_info, mlx_string};

use super::{
    status::check,
    stream::{Device, device_of_stream},
};

/// The release of MLX that was linked.
pub(crate) fn mlx_version() -> Result<String> {
    let mut version = Text(mlx_string { ctx: ptr::null_mut() });
    // SAFETY: a null string is one that MLX allocates.
    check(|| unsafe { mlx_sys::mlx_version(&mut version.0) })?;
    // SAFETY: the string was just written and is alive for the whole call.
    let data = unsafe { mlx_sys::mlx_string_data(version.0) };
    // SAFETY: the data belongs to `version`, which outlives the copy.
    unsafe { copied(data) }.ok_or_else(|| Exception::custom("MLX does not say its version"))
}

/// What the device of the current stream is sold as, if MLX knows.
pub(crate) fn device_name() -> Result<Option<String>> {
    let device = device_of_stream()?;
    let info = Info::of(&device)?;
    let mut known = false;
    let key = c"device_name".as_ptr();
    // SAFETY: the info is alive for the whole call, the key ends in NUL, and MLX writes one `bool`.
    check(|| unsafe { mlx_sys::mlx_device_info_has_key(&mut known, info.0, key) })?;
    if !known {
        return Ok(None);
    }
    let mut name = ptr::null();
    // SAFETY: as above, and MLX writes one pointer.
    check(|| unsafe { mlx_sys::mlx_device_info_get_string(&mut name, info.0, key) })?;
    // SAFETY: the name belongs to `info`, which outlives the copy.
    Ok(unsafe { copied(name) })
}

/// The text at `data`, if there is any.
///
/// # Safety
/// `data` is null, or a string that ends in NUL and is alive.
unsafe fn copied(data: *const c_char) -> Option<String> {
    if data.is_null() {
        return None;
    }
    // SAFETY: not null, so what the caller promises.
    let text = unsafe { CStr::from_ptr(data) };
    Some(text.to_string_lossy().trim().to_owned()).filter(|text| !text.is_empty())
}

/// An owned `mlx_string`.
struct Text(mlx_string);

impl Drop for Text {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a string that nobody else owns.
        unsafe { mlx_sys::mlx_string_free(self.0) };
    }
}

/// An owned `mlx_device_info`.
struct Info(mlx_device_info);

impl Info {
    fn of(device: &Device) -> Result<Self> {
        // SAFETY: the call takes nothing and returns a handle that is ours.
        let mut info = Self(unsafe { mlx_sys::mlx_device_info_new() });
        let device: mlx_device = device.0;
        // SAFETY: both handles are alive for the whole call.
        check(|| unsafe { mlx_sys::mlx_device_info_get(&mut info.0, device) })?;
        Ok(info)
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: nobody else owns the handle.
        unsafe { mlx_sys::mlx_device_info_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use super::*;

    #[test]
    fn the_version_is_numbers_and_dots() {
        let version = mlx_version().unwrap();
        assert!(version.starts_with(|c: char| c.is_ascii_digit()), "{version}");
        assert!(version.contains('.'), "{version}");
    }

    #[test]
    fn the_device_has_a_name() {
        let name = device_name().unwrap();
        assert!(name.as_ref().is_some_and(|name| name.len() > 2), "{name:?}");
    }

    #[test]
    fn no_text_is_no_text() {
        // SAFETY: null and a literal are what the function takes.
        let [none, blank] = [ptr::null(), c" ".as_ptr()].map(|data| unsafe { copied(data) });
        assert_eq!((none, blank), (None, None));
    }
}
