//! The one launcher.

use std::{
    collections::HashMap,
    ffi::c_int,
    ptr,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use mlx_rs::{
    Array,
    error::{Exception, Result},
};

use super::{Call, Kernel, Plan, host};
use crate::{
    ffi::{CudaKernel, exactly},
    target::Target,
};

impl Kernel {
    /// Checks and launches a kernel of this crate.
    ///
    /// # Errors
    /// As [`Call::new`] and [`Call::run`].
    pub(crate) fn call<const M: usize>(
        &'static self,
        inputs: &[&Array],
        plan: Plan,
    ) -> crate::Result<[Array; M]> {
        Ok(exactly(Call::new(self, inputs, plan)?.run()?)?)
    }

    /// The same for a kernel that [writes inputs](super::Argument::written), on arrays for which that is promised.
    ///
    /// # Errors
    /// As [`Call::new`] and [`Call::run_in_place`].
    pub(crate) fn call_in_place<const M: usize>(
        &'static self,
        inputs: &[&Array],
        plan: Plan,
        _: Sole,
    ) -> crate::Result<[Array; M]> {
        let call = Call::new(self, inputs, plan)?;
        // SAFETY: whoever has made the promise vouches for it.
        Ok(exactly(unsafe { call.run_in_place() }?)?)
    }
}

/// The promise that arrays are nobody else's, so that kernels may write them where they lie, behind MLX's back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sole(());

impl Sole {
    /// Makes the promise.
    ///
    /// # Safety
    /// Of each array that a kernel writes by it:
    /// - it has memory of its own, in rows, and no array of that leaves this crate;
    /// - an operation that shall see what was written takes an output of that kernel, or what was made of one: MLX does not know
    ///   to wait otherwise;
    /// - one that shall not see it was handed over before, and the kernel takes something that was made of its result, or it has
    ///   ended, or nothing comes of it.
    pub(crate) const unsafe fn promise() -> Self {
        Self(())
    }
}

impl Call {
    /// Launches a kernel of this crate on the current stream; lazily, but for a host.
    ///
    /// # Errors
    /// Where the stream's device cannot run kernels, or the kernel writes an input. A fault in the text is found when an output
    /// is evaluated.
    pub(crate) fn run(&self) -> Result<Vec<Array>> {
        if self.kernel().writes_inputs() {
            return Err(Exception::custom(format!("[{}] it writes an input", self.kernel().name)));
        }
        // SAFETY: no input is written.
        unsafe { self.run_in_place() }
    }

    /// Launches a kernel of this crate that may [write inputs](super::Argument::written), behind MLX's back; lazily, but for a
    /// host.
    ///
    /// # Safety
    /// What [`Sole::promise`] asks for, of each input that is written.
    ///
    /// # Errors
    /// Where the stream's device cannot run kernels.
    pub(crate) unsafe fn run_in_place(&self) -> Result<Vec<Array>> {
        let target = Target::current()?;
        if let Some(reason) = super::obstacle(target) {
            return Err(Exception::custom(format!("[{}] {reason}", self.kernel().name)));
        }
        match (target, host::get()) {
            (Target::Cpu, Some(host)) => host.run(self),
            // SAFETY: `Call::new` has checked that the arrays are those that the kernel declares. The launcher hands them over
            // row-contiguous or, where the kernel says so, with their strides, in full groups. That a kernel of this crate keeps
            // to such arrays, without a race, is tested for each under sanitizers.
            _ => unsafe { self.launch_on(target) },
        }
    }

    /// Launches the caller's own kernel on the current stream; lazily.
    ///
    /// # Safety
    /// For these arrays and this plan the text must stay inside the arrays, write no input, write every element of every
    /// output, and have no two threads touch one element without a barrier between, if one of them writes.
    ///
    /// Some of the crate's own kernels [write inputs](super::Argument::is_written) after all. Such an input must hold eight
    /// elements or more, in rows, in memory of its own of which nobody else has an array, and what shall see the new elements
    /// must take an output of this call.
    ///
    /// # Errors
    /// As for the crate's own kernels: where the stream's device cannot run any.
    pub unsafe fn run_unchecked(&self) -> Result<Vec<Array>> {
        // SAFETY: the caller vouches for it.
        unsafe { self.run_in_place() }
    }

    /// The threadgroup memory that the launch has to ask for; other arrays have their size in the text.
    fn large_bytes(&self, target: Target) -> u32 {
        match target == Target::Cuda && self.kernel().has_large_array() {
            true => self.launch().threadgroup_bytes,
            false => 0,
        }
    }

    /// # Safety
    /// As for [`Call::run_unchecked`].
    unsafe fn launch_on(&self, target: Target) -> Result<Vec<Array>> {
        let compiled = compiled(self.kernel(), target, self.large_bytes(target))?;
        let threads = |counts: [u32; 3]| counts.map(|count| count as c_int);
        let (grid, group) = (threads(self.launch().grid()), threads(self.launch().group));
        match &*compiled {
            // SAFETY: the caller vouches for the text, and `Launch::check` for counts that fit a C integer.
            Compiled::Cuda(kernel) => unsafe {
                kernel.apply(self.inputs(), self.outputs(), grid, group, self.template())
            },
            #[cfg(feature = "metal")]
            // SAFETY: as above.
            Compiled::Metal(kernel) => unsafe {
                metal::apply(kernel, self, grid.into(), group.into())
            },
        }
    }
}

/// What MLX keeps of a kernel. It compiles the text once for each set of template arguments.
enum Compiled {
    Cuda(CudaKernel),
    #[cfg(feature = "metal")]
    Metal(mlx_rs::fast::MetalKernel),
}

// SAFETY: both are functions of MLX that hold their text, or the name of a file that `CudaKernel` keeps and nobody writes; to
// call one changes nothing.
unsafe impl Send for Compiled {}
// SAFETY: as above.
unsafe impl Sync for Compiled {}

impl Compiled {
    fn new(kernel: &Kernel, target: Target, large_bytes: u32) -> Result<Self> {
        let name = kernel.unique_name(target);
        let (header, body) = (kernel.header(target), kernel.body());
        let inputs: Vec<_> = kernel.inputs.iter().map(|argument| argument.name).collect();
        let outputs: Vec<_> = kernel.outputs.iter().map(|argument| argument.name).collect();
        let in_rows = kernel.takes_rows();
        match target {
            #[cfg(feature = "metal")]
            Target::Metal => {
                metal::new(&name, &inputs, &outputs, header, &body, in_rows).map(Self::Metal)
            }
            _ => {
                let text = (&*header, &*body);
                CudaKernel::new(&name, &inputs, &outputs, text, in_rows, large_bytes)
                    .map(Self::Cuda)
            }
        }
    }
}

fn compiled(kernel: &'static Kernel, target: Target, large_bytes: u32) -> Result<Arc<Compiled>> {
    type Cache = HashMap<(usize, Target, u32), Arc<Compiled>>;
    static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (ptr::from_ref(kernel).addr(), target, large_bytes);
    if let Some(compiled) = cache.get(&key) {
        return Ok(compiled.clone());
    }
    let compiled = Arc::new(Compiled::new(kernel, target, large_bytes)?);
    cache.insert(key, compiled.clone());
    Ok(compiled)
}

#[cfg(feature = "metal")]
mod metal {
    use std::ffi::c_int;

    use mlx_rs::{
        Array,
        error::Result,
        fast::{
            MetalKernel, MetalKernelApplyOptions, MetalKernelOptions, MetalKernelOutput,
            TemplateArg,
        },
    };

    use crate::kernel::{Call, Template};

    pub(super) fn new(
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        header: String,
        body: &str,
        ensure_row_contiguous: bool,
    ) -> Result<MetalKernel> {
        let options = MetalKernelOptions { header, ensure_row_contiguous, atomic_outputs: false };
        MetalKernel::new(name, inputs, outputs, body, options)
    }

    /// # Safety
    /// As for [`Call::run_unchecked`].
    pub(super) unsafe fn apply(
        kernel: &MetalKernel,
        call: &Call,
        grid: (c_int, c_int, c_int),
        group: (c_int, c_int, c_int),
    ) -> Result<Vec<Array>> {
        let outputs = call.outputs().iter();
        let outputs: Vec<_> = outputs
            .map(|output| MetalKernelOutput { shape: output.shape.clone(), dtype: output.dtype })
            .collect();
        let template = call.template().iter().map(|&(name, value)| (name.to_owned(), value.into()));
        let options = MetalKernelApplyOptions {
            template_args: template.collect(),
            ..MetalKernelApplyOptions::default()
        };
        // SAFETY: the caller vouches for the text.
        unsafe { kernel.apply(call.inputs(), &outputs, grid, group, options) }
    }

    impl From<Template> for TemplateArg {
        fn from(argument: Template) -> Self {
            match argument {
                Template::Dtype(dtype) => Self::Dtype(dtype),
                Template::Int(value) => Self::Int(value),
                Template::Bool(value) => Self::Bool(value),
            }
        }
    }
}
