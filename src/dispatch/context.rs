//! Where an operation is about to run.

use crate::{
    config::Settings,
    error::Result,
    ffi::{self, DeviceKind},
};

/// The kind of device that the current stream runs on.
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

/// Everything outside a problem that the choice of a backend may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// The device of the current stream.
    pub target: Target,
    /// The thresholds in force.
    pub settings: Settings,
}

impl Context {
    /// Reads the device of this thread's current stream, scopes included, and the settings.
    ///
    /// # Errors
    /// When MLX cannot name the stream's device.
    ///
    /// # Example
    /// ```
    /// use mlx_primitives::dispatch::{Context, Target};
    /// use mlx_rs::{Device, with_device};
    ///
    /// let context = with_device(Device::cpu(), Context::current)?;
    /// assert_eq!(context.target, Target::Cpu);
    /// # Ok::<(), mlx_primitives::Error>(())
    /// ```
    pub fn current() -> Result<Self> {
        let target = match ffi::current_device()? {
            DeviceKind::Cpu => Target::Cpu,
            DeviceKind::Gpu if ffi::metal_is_available()? => Target::Metal,
            DeviceKind::Gpu => Target::Cuda,
        };
        Ok(Self { target, settings: Settings::current().clone() })
    }
}
