//! The device that the current stream runs on.

use mlx_rs::{
    Device, DeviceType, Stream,
    error::{Exception, Result},
};

/// What kind of device a stream runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Cpu,
    Gpu,
}

/// The device of the stream that the next operation on this thread will use.
pub(crate) fn current_device() -> Result<DeviceKind> {
    let stream = Stream::thread_local_or_default();
    // Reading the default device through mlx-rs installs its error handler; without one, MLX ends
    // the process at the first error.
    Device::try_default()?;
    // SAFETY: returns an empty handle, freed below on every path.
    let mut device = unsafe { mlx_sys::mlx_device_new() };
    let mut kind = 0;
    // SAFETY: `stream` is alive for the call and `device` is a valid place for the result.
    let mut status = unsafe { mlx_sys::mlx_stream_get_device(&mut device, stream.as_ptr()) };
    if status == 0 {
        // SAFETY: the call above filled `device`, and `kind` is a valid place for the result.
        status = unsafe { mlx_sys::mlx_device_get_type(&mut kind, device) };
    }
    // SAFETY: `device` was made above and is not used again.
    unsafe { mlx_sys::mlx_device_free(device) };
    match status {
        0 if kind == u32::from(DeviceType::Gpu) => Ok(DeviceKind::Gpu),
        0 => Ok(DeviceKind::Cpu),
        _ => Err(Exception::custom("MLX could not name the device of the current stream")),
    }
}

/// Whether this MLX was built with Metal and finds a device.
pub(crate) fn metal_is_available() -> bool {
    let mut available = false;
    // SAFETY: `available` is a valid place for the result.
    let status = unsafe { mlx_sys::mlx_metal_is_available(&mut available) };
    status == 0 && available
}
