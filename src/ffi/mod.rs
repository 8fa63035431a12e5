//! What MLX's C interface offers and mlx-rs does not: functions with a gradient of their own, recomputation, the
//! order of computation, the device of the current stream, the names of device and release, and every quantization mode.
//!
//! Each function here is safe to call from safe code. A failure of MLX is an `Err` with MLX's own message; an error or
//! a panic of a Rust closure that MLX calls is an `Err` with that closure's own text, also out of the gradient
//! transforms of mlx-rs. Nothing here evaluates an array, and nothing here knows an op of this crate.
#![cfg_attr(not(test), expect(dead_code, reason = "the ops that use these come after them"))]

mod accelerated;
mod after;
mod array;
mod checkpoint;
mod closure;
mod cuda_kernel;
#[cfg_attr(not(target_os = "linux"), path = "not_included.rs")]
mod included;
mod custom_vjp;
mod machine;
mod quantize;
mod status;
mod stream;
mod transform;
mod vector;

pub use self::cuda_kernel::{OutputSpec, Template};
#[allow(unused_imports, reason = "the ops that use these come after them")]
pub(crate) use self::{
    accelerated::accelerated,
    after::after,
    checkpoint::checkpoint,
    cuda_kernel::CudaKernel,
    custom_vjp::{Vjp, custom_vjp},
    machine::{device_name, mlx_version},
    quantize::{Packed, QuantFormat, QuantMode, dequantize, quantize, quantized_matmul},
    stream::{DeviceKind, cuda_is_available, current_device, metal_is_available, synchronize},
    vector::exactly,
};
