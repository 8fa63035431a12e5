//! MLX's custom kernels for NVIDIA GPUs, which mlx-rs has for Apple's alone.

use std::{
    ffi::{CString, c_int},
    ptr,
};

use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result},
};
use mlx_sys::{mlx_fast_cuda_kernel, mlx_fast_cuda_kernel_config, mlx_vector_string};

use super::{included::Included, status::check, stream, vector::Vector};

/// An argument that a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Template {
    /// An element type.
    Dtype(Dtype),
    /// An integer.
    Int(i32),
    /// A truth value.
    Bool(bool),
}

/// What a kernel writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSpec {
    /// The shape of the array.
    pub shape: Vec<i32>,
    /// The type of its elements.
    pub dtype: Dtype,
}

/// A kernel written in CUDA's C++, compiled by MLX on first use: the counterpart of mlx-rs's `MetalKernel`.
pub(crate) struct CudaKernel {
    handle: mlx_fast_cuda_kernel,
    /// What MLX reads whenever it compiles the kernel for other template arguments.
    _text: Option<Included>,
}

impl CudaKernel {
    /// The parts of a kernel, of its text the header and the body; nothing is compiled yet. Whether inputs that are not
    /// row-contiguous are copied first, is for `in_rows` to say. `shared_bytes`: of the array whose size the text leaves open.
    pub(crate) fn new(
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        (header, body): (&str, &str),
        in_rows: bool,
        shared_bytes: u32,
    ) -> Result<Self> {
        let text = Included::new(header, body, inputs);
        let (header, body) = text.as_ref().map_or((header, body), Included::lines);
        let shared_bytes = shared_bytes.cast_signed();
        let (name, header, body) = (c_string(name)?, c_string(header)?, c_string(body)?);
        let (inputs, outputs) = (Strings::new(inputs)?, Strings::new(outputs)?);
        let handle = mlx_fast_cuda_kernel { ctx: ptr::null_mut() };
        let mut kernel = Self { handle, _text: text };
        check(|| {
            // SAFETY: every string and list is alive for the whole call, and MLX copies them.
            kernel.handle = unsafe {
                mlx_sys::mlx_fast_cuda_kernel_new(
                    name.as_ptr(),
                    inputs.0,
                    outputs.0,
                    body.as_ptr(),
                    header.as_ptr(),
                    in_rows,
                    shared_bytes,
                )
            };
            c_int::from(kernel.handle.ctx.is_null())
        })?;
        Ok(kernel)
    }

    /// Runs the kernel on the current stream, lazily.
    ///
    /// # Safety
    /// What mlx-rs's `MetalKernel::apply` asks for: for these arguments the kernel stays inside its buffers, writes
    /// no input, writes every element of every output, and has no race.
    pub(crate) unsafe fn apply(
        &self,
        inputs: &[Array],
        outputs: &[OutputSpec],
        grid: [c_int; 3],
        group: [c_int; 3],
        template: &[(&str, Template)],
    ) -> Result<Vec<Array>> {
        let config = Config::new()?;
        config.geometry(grid, group)?;
        outputs.iter().try_for_each(|output| config.output(output))?;
        template.iter().try_for_each(|(name, argument)| config.template(name, *argument))?;
        let (inputs, stream) = (Vector::from_arrays(inputs)?, stream::current());
        // SAFETY: kernel, list, configuration and stream are alive for the whole call; the caller vouches for the rest.
        let outputs = Vector::out(|res| unsafe {
            mlx_sys::mlx_fast_cuda_kernel_apply(
                res,
                self.handle,
                inputs.as_ptr(),
                config.0,
                stream.as_ptr(),
            )
        })?;
        outputs.to_arrays()
    }
}

impl Drop for CudaKernel {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a kernel that nobody else owns.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.handle) };
    }
}

/// The arguments of one launch.
struct Config(mlx_fast_cuda_kernel_config);

impl Config {
    fn new() -> Result<Self> {
        let mut config = Self(mlx_fast_cuda_kernel_config { ctx: ptr::null_mut() });
        check(|| {
            // SAFETY: MLX allocates a configuration of its own.
            config.0 = unsafe { mlx_sys::mlx_fast_cuda_kernel_config_new() };
            c_int::from(config.0.ctx.is_null())
        })?;
        Ok(config)
    }

    fn geometry(&self, grid: [c_int; 3], group: [c_int; 3]) -> Result<()> {
        let [x, y, z] = grid;
        // SAFETY: the configuration is alive.
        check(|| unsafe { mlx_sys::mlx_fast_cuda_kernel_config_set_grid(self.0, x, y, z) })?;
        let [x, y, z] = group;
        // SAFETY: the configuration is alive.
        check(|| unsafe { mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(self.0, x, y, z) })
    }

    fn output(&self, output: &OutputSpec) -> Result<()> {
        let (shape, dtype) = (&output.shape, output.dtype.into());
        // SAFETY: the configuration and the shape are alive, and MLX copies the shape.
        check(|| unsafe {
            mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                self.0,
                shape.as_ptr(),
                shape.len(),
                dtype,
            )
        })
    }

    fn template(&self, name: &str, argument: Template) -> Result<()> {
        let name = c_string(name)?;
        let (config, name) = (self.0, name.as_ptr());
        check(|| match argument {
            // SAFETY: the configuration and the name are alive, and MLX copies the name.
            Template::Dtype(dtype) => unsafe {
                mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_dtype(
                    config,
                    name,
                    dtype.into(),
                )
            },
            // SAFETY: as above.
            Template::Int(value) => unsafe {
                mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(config, name, value)
            },
            // SAFETY: as above.
            Template::Bool(value) => unsafe {
                mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_bool(config, name, value)
            },
        })
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a configuration that nobody else owns.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_config_free(self.0) };
    }
}

/// An owned `mlx_vector_string`.
struct Strings(mlx_vector_string);

impl Strings {
    fn new(strings: &[&str]) -> Result<Self> {
        let mut list = Self(mlx_vector_string { ctx: ptr::null_mut() });
        check(|| {
            // SAFETY: MLX allocates a list of its own.
            list.0 = unsafe { mlx_sys::mlx_vector_string_new() };
            c_int::from(list.0.ctx.is_null())
        })?;
        for string in strings {
            let string = c_string(string)?;
            // SAFETY: the list and the string are alive, and MLX copies the string.
            check(|| unsafe { mlx_sys::mlx_vector_string_append_value(list.0, string.as_ptr()) })?;
        }
        Ok(list)
    }
}

impl Drop for Strings {
    fn drop(&mut self) {
        // SAFETY: the handle is null, which MLX ignores, or a list that nobody else owns.
        unsafe { mlx_sys::mlx_vector_string_free(self.0) };
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|error| Exception::custom(error.to_string()))
}
