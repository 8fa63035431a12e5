//! Kernels as data: what an operation's own MSL text is, and how it is launched.
//!
//! A kernel is one file in `metal/`: a header of helpers, the line [`BODY_MARK`], and a body, which is what MLX wraps
//! into a function of its own. Beside its operation stands one `static` [`Kernel`] that names the text and its
//! arguments; a pure function of the problem makes a [`Plan`]; and a [`Call`] is both with the arrays, checked. The
//! same text is meant for Apple GPUs, through MLX's `metal_kernel`, and for NVIDIA GPUs, through its `cuda_kernel`; in tests
//! it runs on the CPU through whatever [`set_host`] was given. No kernel has been run on an Apple GPU yet.
//!
//! What is taken care of here, once, for every kernel:
//!
//! - inputs are row-contiguous, but for those [`strided`](Argument::strided) and those [written](Argument::is_written), and a
//!   0-d array is passed as one of shape `[1]`;
//! - grids are whole groups, so that no device runs a part of one;
//! - the types of its arrays, and its constants, are template arguments of the text;
//! - an empty array, one of more than 2³¹ elements, and a launch that some GPU cannot run are errors.
//!
//! What a text must do itself: an input of fewer than eight elements has address space `constant` and not `device`, so
//! helpers take pointers by template; and threads beyond the last element do nothing. Of an array that is declared by
//! `LARGE_THREADGROUP_ARRAY`, the only one of its kernel, [`Launch::threadgroup_bytes`] is the size.
//!
//! # A kernel of one's own
//! ```
//! use mlx_primitives::kernel::{Argument, Call, File, Kernel, Launch, Plan};
//! use mlx_rs::array;
//!
//! static DOUBLE: Kernel = Kernel {
//!     name: "double",
//!     inputs: &[Argument::of("T", "x", &["N"])],
//!     outputs: &[Argument::of("T", "y", &["N"])],
//!     constants: &[],
//!     fragments: &[],
//!     // A file of its own, by `include_str!`, in anything longer.
//!     file: File::new(
//!         "double.metal",
//!         "uint i = thread_position_in_grid.x;\n\
//!          if (i < uint(x_shape[0])) y[i] = x[i] + x[i];\n",
//!     ),
//! };
//!
//! let x = array!([1.0, 2.0, 3.0]);
//! let launch = Launch { groups: [1, 1, 1], group: [32, 1, 1], threadgroup_bytes: 0 };
//! let call = Call::new(&DOUBLE, &[&x], Plan { constants: vec![], extents: vec![], launch })?;
//! assert_eq!(call.outputs()[0].shape, [3]);
//! // On a GPU, or with a host: `unsafe { call.run_unchecked() }`.
//!
//! let wrong = array!([[1.0, 2.0]]);
//! let call = Call::new(&DOUBLE, &[&wrong], Plan { constants: vec![], extents: vec![], launch });
//! let message = "[double] x must have shape [N] but got [1, 2]";
//! assert_eq!(call.err().map(|error| error.to_string()).as_deref(), Some(message));
//! # Ok::<(), mlx_primitives::Error>(())
//! ```
//!
//! `metal-host` in this repository runs such a kernel on a Linux CPU under sanitizers.

mod call;
mod grad;
mod host;
mod inference;
mod run;
mod text;

mod launch;
mod rows;
mod tiles;

pub use call::{Call, Constant, Plan};
pub(crate) use grad::{Vjp, differentiable, differentiable_by_reference};
pub use host::{Host, set_host};
pub use inference::inference;
pub(crate) use inference::is_on as is_inference;
pub use launch::Launch;
pub(crate) use rows::Rows;
pub(crate) use run::Sole;
pub use text::File;
pub(crate) use text::metal;
pub(crate) use tiles::{TILE, simds_for};

use mlx_rs::{Array, Dtype};

pub use crate::ffi::{OutputSpec, Template};
use crate::{target::Target, uploads};

/// The line between the helpers and the body of a kernel file.
pub const BODY_MARK: &str = "// ---- body ----";

/// The most elements of one array, so that an index fits the 32 bits that kernels count in.
pub const MAX_ELEMENTS: usize = 1 << 31;

/// One launchable kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// What the function that MLX compiles is named after.
    pub name: &'static str,
    /// The input arrays, in order.
    pub inputs: &'static [Argument],
    /// The output arrays, in order.
    pub outputs: &'static [Argument],
    /// The names of the constants it is compiled for, in order.
    pub constants: &'static [&'static str],
    /// The texts shared with other kernels, which go before its own helpers.
    pub fragments: &'static [File],
    /// The kernel's own file.
    pub file: File,
}

/// An array that a kernel reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the text.
    pub name: &'static str,
    /// The type of its elements.
    pub element: Element,
    /// Its axes: a number for a fixed size, else a letter that stands for one size in all arguments of the kernel.
    pub shape: &'static [&'static str],
    /// Whether the text reads it by strides; only inputs are.
    pub strided: bool,
    /// Whether the text writes it where it lies; only inputs are.
    pub(crate) written: bool,
}

impl Argument {
    /// An array of these axes, whose elements have the type that the text calls `element`.
    pub const fn of(
        element: &'static str,
        name: &'static str,
        shape: &'static [&'static str],
    ) -> Self {
        Self { name, element: Element::Floating(element), shape, strided: false, written: false }
    }

    /// An array of these axes, whose elements are always of `dtype`.
    pub const fn fixed(dtype: Dtype, name: &'static str, shape: &'static [&'static str]) -> Self {
        Self { name, element: Element::Is(dtype), shape, strided: false, written: false }
    }

    /// An input of these axes, whose elements may have any type; the text calls it `element`.
    pub const fn any(
        element: &'static str,
        name: &'static str,
        shape: &'static [&'static str],
    ) -> Self {
        Self { name, element: Element::Any(element), shape, strided: false, written: false }
    }

    /// The same as an input that is passed as it lies in memory, without a copy: its element `[i, j]` is at
    /// `i * NAME_strides[0] + j * NAME_strides[1]`.
    ///
    /// Strides are known only when the kernel runs, so the body looks at them: the last may be another than 1, that of a
    /// broadcast axis is 0, that of a reversed axis is negative, and a row may start on any element.
    #[must_use]
    pub const fn strided(self) -> Self {
        Self { strided: true, ..self }
    }

    /// The same as an input some of whose elements the kernel writes where they lie, which MLX does not know of. The text gets
    /// at it by `WRITTEN(T, name)`.
    #[must_use]
    pub(crate) const fn written(self) -> Self {
        Self { written: true, ..self }
    }

    /// Whether the text writes it where it lies.
    pub const fn is_written(&self) -> bool {
        self.written
    }
}

impl Kernel {
    /// Whether MLX makes all inputs row-contiguous: it does so for all of them or for none.
    pub(crate) fn takes_rows(&self) -> bool {
        !self.inputs.iter().any(|input| input.strided)
    }

    /// Whether one of its inputs is written where it lies.
    pub(crate) fn writes_inputs(&self) -> bool {
        self.inputs.iter().any(Argument::is_written)
    }

    /// Whether its threadgroup memory is an array that gets its size from the launch, on devices that tell these apart.
    pub(crate) fn has_large_array(&self) -> bool {
        self.file.has_large_array
    }

    /// The most threadgroup memory that it may take on every device of this kind, in bytes.
    pub(crate) fn most_threadgroup_bytes(&self, target: Target) -> u32 {
        match self.has_large_array() {
            true => Launch::most_large_threadgroup_bytes(target),
            false => Launch::most_threadgroup_bytes(target),
        }
    }
}

/// The type of an argument's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// f32, f16 or bf16: whichever the first input that names this template parameter has.
    Floating(&'static str),
    /// Whichever the first input that names this template parameter has.
    Any(&'static str),
    /// This type and no other.
    Is(Dtype),
}

/// Why no kernel can run on `target`, if none can.
pub(crate) fn obstacle(target: Target) -> Option<&'static str> {
    match target {
        Target::Cpu if host::is_set() => None,
        Target::Cpu => Some("kernels run on a GPU, and the current stream is on the CPU"),
        Target::Metal if cfg!(feature = "metal") => None,
        Target::Metal => Some("the crate was built without its `metal` feature"),
        Target::Cuda => None,
    }
}

/// What a kernel is given for an input of so many axes that its constants leave unread.
pub(crate) fn stand_in(dtype: Dtype, axes: usize) -> Array {
    uploads::zeros(dtype, &vec![1; axes])
}

/// Why no kernel can write an array of this shape, if none can.
pub(crate) fn refusal_of_result(shape: &[i32]) -> Option<&'static str> {
    let fits = shape.iter().try_fold(1_usize, |product, &size| {
        let product = product.checked_mul(size.unsigned_abs() as usize)?;
        (product <= MAX_ELEMENTS).then_some(product)
    });
    fits.is_none().then_some("a kernel writes no more than 2^31 elements")
}

/// Why no kernel can take these arrays, if none can.
pub(crate) fn refusal<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> Option<&'static str> {
    arrays.into_iter().find_map(|array| match array.size() {
        0 => Some("a kernel takes no empty array"),
        size if size > MAX_ELEMENTS => Some("a kernel takes no more than 2^31 elements"),
        _ => None,
    })
}
