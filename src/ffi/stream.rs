//! Where the next operation runs.

use std::{ffi::c_int, ptr};

use mlx_rs::{
    Stream,
    error::{Exception, Result},
};
use mlx_sys::{mlx_device, mlx_device_type};

use super::status::{check, install};

/// The kind of device that a stream belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Cpu,
    /// An Apple GPU or an NVIDIA GPU: see [`metal_is_available`] and [`cuda_is_available`].
    Gpu,
}

/// The device of the stream that an mlx-rs operation would use here: that of the innermost `mlx_rs::with_stream` or
/// `mlx_rs::with_device` on this thread, else the default device.
pub(crate) fn current_device() -> Result<DeviceKind> {
    let device = device_of_stream()?;
    let mut kind: mlx_device_type = 0;
    // SAFETY: the device is alive for the whole call.
    check(|| unsafe { mlx_sys::mlx_device_get_type(&mut kind, device.0) })?;
    match kind {
        mlx_sys::mlx_device_type__MLX_CPU => Ok(DeviceKind::Cpu),
        mlx_sys::mlx_device_type__MLX_GPU => Ok(DeviceKind::Gpu),
        other => Err(Exception::custom(format!("MLX named device type {other}"))),
    }
}

/// The device itself of that stream.
pub(super) fn device_of_stream() -> Result<Device> {
    let stream = current();
    let mut device = Device(mlx_device { ctx: ptr::null_mut() });
    // SAFETY: the stream is alive for the whole call, and a null device is one that MLX allocates.
    check(|| unsafe { mlx_sys::mlx_stream_get_device(&mut device.0, stream.as_ptr()) })?;
    Ok(device)
}

/// Whether MLX was built with Metal and this machine has an Apple GPU.
pub(crate) fn metal_is_available() -> Result<bool> {
    // SAFETY: MLX writes one `bool`.
    flag(|res| unsafe { mlx_sys::mlx_metal_is_available(res) })
}

/// Whether MLX was built with CUDA and this machine has an NVIDIA GPU.
pub(crate) fn cuda_is_available() -> Result<bool> {
    // SAFETY: MLX writes one `bool`.
    flag(|res| unsafe { mlx_sys::mlx_cuda_is_available(res) })
}

/// Waits until that stream has done all that it was given, and MLX has let go of what that read: a GPU tells of results
/// first, and buffers are given back on a thread of MLX's a little later.
pub(crate) fn synchronize() -> Result<()> {
    let stream = current();
    // SAFETY: the stream is alive for the whole call.
    check(|| unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) })
}

/// The stream that an mlx-rs operation would use here.
pub(super) fn current() -> Stream {
    // Asking for it makes C calls whose failure mlx-rs does not expect.
    install();
    Stream::thread_local_or_default()
}

fn flag(call: impl FnOnce(*mut bool) -> c_int) -> Result<bool> {
    let mut value = false;
    check(|| call(&mut value))?;
    Ok(value)
}

/// An owned `mlx_device`.
pub(super) struct Device(pub(super) mlx_device);

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a device that nobody else owns.
        unsafe { mlx_sys::mlx_device_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

    use std::sync::Mutex;

    use mlx_rs::{
        Array, Device as MlxDevice,
        memory::active_memory,
        transforms::{async_eval, eval},
        with_device, with_stream,
    };

    use super::*;

    fn gpu() -> bool {
        metal_is_available().unwrap() || cuda_is_available().unwrap()
    }

    /// Held by whoever relies on the default device, which is one for the process.
    static DEFAULT: Mutex<()> = Mutex::new(());

    #[test]
    fn the_default_device_is_a_gpu_where_there_is_one_until_it_is_set() {
        let _held = DEFAULT.lock().unwrap();
        let before = MlxDevice::try_default().unwrap();
        assert_eq!(current_device().unwrap() == DeviceKind::Gpu, gpu());
        MlxDevice::set_default(&MlxDevice::cpu());
        let here = current_device();
        let there = std::thread::spawn(current_device).join().unwrap();
        MlxDevice::set_default(&before);
        assert_eq!([here.unwrap(), there.unwrap()], [DeviceKind::Cpu; 2]);
        assert_eq!(current_device().unwrap() == DeviceKind::Gpu, gpu());
    }

    #[test]
    fn a_stream_that_was_waited_for_holds_nothing() {
        let _held = DEFAULT.lock().unwrap();
        let x = Array::ones::<f32>(&[1 << 26]).unwrap();
        eval([&x]).unwrap();
        let doubled = x.add(&x).unwrap();
        async_eval([&doubled]).unwrap();
        synchronize().unwrap();
        let before = active_memory().unwrap();
        drop(x);
        // Of 256 MB, whatever other tests take meanwhile.
        assert!(active_memory().unwrap() + (128 << 20) <= before);
    }

    #[test]
    fn metal_needs_a_mac_and_cuda_does_not_run_on_one() {
        assert!(!metal_is_available().unwrap() || cfg!(target_vendor = "apple"));
        assert!(!cuda_is_available().unwrap() || !cfg!(target_vendor = "apple"));
    }

    #[test]
    fn the_innermost_scope_counts_and_ends() {
        let _held = DEFAULT.lock().unwrap();
        let outside = current_device().unwrap();
        with_device(MlxDevice::cpu(), || {
            assert_eq!(current_device().unwrap(), DeviceKind::Cpu);
            if gpu() {
                with_device(MlxDevice::gpu(), || {
                    assert_eq!(current_device().unwrap(), DeviceKind::Gpu);
                });
            }
            with_stream(&Stream::cpu(), || {
                assert_eq!(current_device().unwrap(), DeviceKind::Cpu);
            });
            assert_eq!(current_device().unwrap(), DeviceKind::Cpu);
        });
        assert_eq!(current_device().unwrap(), outside);
    }

    #[test]
    fn a_scope_does_not_reach_another_thread() {
        let _held = DEFAULT.lock().unwrap();
        let outside = current_device().unwrap();
        with_device(MlxDevice::cpu(), || {
            let there = std::thread::spawn(current_device).join().unwrap();
            assert_eq!(there.unwrap(), outside);
        });
    }
}
