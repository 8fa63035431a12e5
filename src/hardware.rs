//! The names of what computes.

use crate::{error::Result, ffi};

/// Names the device of the current stream as it is sold: "Apple M2 Max", "NVIDIA H200". `None` if MLX knows no name for it.
///
/// # Errors
/// When MLX cannot name the stream's device.
///
/// # Example
/// ```
/// println!("{:?}", mlx_primitives::hardware::device_name()?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn device_name() -> Result<Option<String>> {
    Ok(ffi::device_name()?)
}

/// Names the release of MLX that was linked: "0.32.2".
///
/// # Errors
/// When MLX does not say.
///
/// # Example
/// ```
/// assert!(mlx_primitives::hardware::mlx_version()?.contains('.'));
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn mlx_version() -> Result<String> {
    Ok(ffi::mlx_version()?)
}
