//! A bench as data.

use mlx_primitives::{Dispatch, dispatch::Target};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    transforms::{compile::compile, fallible_vjp},
};

use super::check::Tolerance;

/// What cases are made for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    /// The device, which decides sizes and dtypes.
    pub(crate) target: Target,
    /// How operations that have several backends pick one.
    pub(crate) dispatch: Dispatch,
}

/// One operation on one problem: what computes it here, what computes it in MLX, and what it
/// should come to.
///
/// Arrays are lazy, so a case costs nothing until it is run, and its memory is given back with it.
pub(crate) struct Case {
    pub(crate) op: &'static str,
    /// [`sizes`](super::sizes) and whatever else tells it from the operation's other cases.
    pub(crate) shape: String,
    /// That of the results.
    pub(crate) dtype: Dtype,
    /// Handed to every closure below.
    pub(crate) inputs: Vec<Array>,
    /// What cannot be avoided.
    pub(crate) work: Work,
    pub(crate) ours: Run,
    /// Everything that a user of MLX alone might write; the fastest is "the best of MLX".
    pub(crate) baselines: Vec<(&'static str, Run)>,
    pub(crate) reference: Run,
    /// How far from the reference ours may be.
    pub(crate) tolerance: Tolerance,
}

/// What a device would be busy with if nothing were wasted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Work {
    /// Bytes read and written, each once.
    Bytes(usize),
    /// Multiplications and additions of matrix products, where they outweigh the bytes.
    Flops(f64),
}

/// Builds results from inputs, lazily.
pub(crate) type Run = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// One array or several.
pub(crate) trait Outputs {
    fn arrays(self) -> Vec<Array>;
}

impl Outputs for Array {
    fn arrays(self) -> Vec<Array> {
        vec![self]
    }
}

impl Outputs for Vec<Array> {
    fn arrays(self) -> Vec<Array> {
        self
    }
}

impl Outputs for (Array, Array) {
    fn arrays(self) -> Vec<Array> {
        vec![self.0, self.1]
    }
}

/// A call of this crate.
pub(crate) fn ours<O: Outputs>(
    run: impl Fn(&[Array]) -> mlx_primitives::Result<O> + 'static,
) -> Run {
    Box::new(move |inputs| Ok(run(inputs)?.arrays()))
}

/// The definition, computed in f32 whatever the dtype of the case.
pub(crate) fn reference<O: Outputs>(
    run: impl Fn(&[Array]) -> mlx_primitives::Result<O> + 'static,
) -> Run {
    widened(ours(run))
}

/// `run` with its half-precision inputs in f32.
pub(crate) fn widened(mut run: Run) -> Run {
    Box::new(move |inputs| run(&inputs.iter().map(wide).collect::<Result<Vec<_>, _>>()?))
}

fn wide(input: &Array) -> Result<Array, Exception> {
    match input.dtype() {
        Dtype::Float16 | Dtype::Bfloat16 => input.as_dtype(Dtype::Float32),
        _ => Ok(input.clone()),
    }
}

/// Calls of MLX, run as they stand.
pub(crate) fn mlx<O: Outputs>(run: impl Fn(&[Array]) -> Result<O, Exception> + 'static) -> Run {
    Box::new(move |inputs| Ok(run(inputs)?.arrays()))
}

/// Calls of MLX, fused by its compiler.
pub(crate) fn compiled<O: Outputs>(
    run: impl Fn(&[Array]) -> Result<O, Exception> + 'static,
) -> Run {
    Box::new(compile(
        move |inputs: &[Array]| -> Result<Vec<Array>, Exception> { Ok(run(inputs)?.arrays()) },
        false,
    ))
}

/// The first `count` arrays are inputs, the others what flows back into each result; the results of the function and the
/// gradients of its inputs.
pub(crate) fn with_gradients<O: Outputs>(
    count: usize,
    run: impl Fn(&[Array]) -> Result<O, Exception> + Clone + 'static,
) -> Run {
    Box::new(move |arrays| {
        let (inputs, cotangents) = arrays.split_at(count);
        let run = run.clone();
        let function = move |inputs: &[Array]| Ok(run(inputs)?.arrays());
        let (mut outputs, gradients) = fallible_vjp(function, inputs, cotangents)?;
        outputs.extend(gradients);
        Ok(outputs)
    })
}
