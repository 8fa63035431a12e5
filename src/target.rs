//! The kinds of device that MLX computes on.

use crate::{
    error::Result,
    ffi::{self, DeviceKind},
};

/// The kind of device that a stream runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// MLX's CPU back end.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
}

impl Target {
    /// The device of this thread's current stream, scopes included.
    ///
    /// # Errors
    /// When MLX cannot name the stream's device.
    pub fn current() -> Result<Self> {
        Ok(match ffi::current_device()? {
            DeviceKind::Cpu => Self::Cpu,
            DeviceKind::Gpu if ffi::metal_is_available()? => Self::Metal,
            DeviceKind::Gpu => Self::Cuda,
        })
    }
}
