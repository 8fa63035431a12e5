//! Where an operation is about to run.

use crate::{config::Settings, error::Result, kernel, target::Target};

/// Everything outside a problem that the choice of a backend may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// The device of the current stream.
    pub target: Target,
    /// Why no kernel can run there, if none can.
    pub obstacle: Option<&'static str>,
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
        let target = Target::current()?;
        let obstacle = kernel::obstacle(target);
        Ok(Self { target, obstacle, settings: Settings::current().clone() })
    }
}
