//! One pass over memory instead of one an op: formulas fused by MLX's compiler.

use std::{cell::RefCell, collections::HashMap, hash::Hash};

use mlx_rs::{Array, Stream, error::Exception, transforms::compile::compile};

use crate::error::Result;

/// An elementwise formula of one output, over inputs that broadcast to its shape; a kind of it is traced by itself.
pub(crate) type Formula<Kind> = fn(Kind, &[Array]) -> Result<Array>;

type Compiled = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// What MLX has traced of one formula. One a thread, as MLX's own cache is.
///
/// Inputs that are being traced, by `grad` or an outer `compile`, pass through MLX's compiler
/// untouched: it then calls the formula itself, so gradients never meet the fused kernel.
pub(crate) struct Fused<Kind> {
    formula: Formula<Kind>,
    traces: RefCell<Traces<Kind>>,
}

/// The traces made on one stream. Each is bound to it, and MLX looks one up by its own default
/// stream, which the scopes of mlx-rs do not move; so a change of stream drops them.
struct Traces<Kind> {
    stream: Option<i32>,
    compiled: HashMap<Kind, Compiled>,
}

impl<Kind: Copy + Eq + Hash + 'static> Fused<Kind> {
    pub(crate) fn new(formula: Formula<Kind>) -> Self {
        let traces = Traces { stream: None, compiled: HashMap::new() };
        Self { formula, traces: RefCell::new(traces) }
    }

    pub(crate) fn call(&self, kind: Kind, inputs: &[Array]) -> Result<Array> {
        // Where there is nothing to compute, MLX's CUDA back end divides by zero in what it has compiled.
        if inputs.iter().any(|input| input.size() == 0) {
            return (self.formula)(kind, inputs);
        }
        let stream = Some(Stream::thread_local_or_default().get_index()?);
        // Held while MLX traces, and no formula calls back here.
        let mut traces = self.traces.borrow_mut();
        if traces.stream != stream {
            *traces = Traces { stream, compiled: HashMap::new() };
        }
        let formula = self.formula;
        let compiled = traces.compiled.entry(kind).or_insert_with(|| trace(formula, kind));
        Ok(compiled(inputs)?.swap_remove(0))
    }
}

fn trace<Kind: Copy + 'static>(formula: Formula<Kind>, kind: Kind) -> Compiled {
    let traced = move |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        Ok(vec![formula(kind, inputs)?])
    };
    let shapeless = true;
    Box::new(compile(traced, shapeless))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use mlx_rs::{Device, transforms::fallible_vjp, with_device};

    use super::*;
    use crate::activation::Activation;

    thread_local! {
        static CALLS: Cell<u32> = const { Cell::new(0) };
    }

    fn counted(_: Activation, inputs: &[Array]) -> Result<Array> {
        CALLS.set(CALLS.get() + 1);
        Ok(inputs[0].square()?.add(&inputs[0])?)
    }

    /// How often the formula ran, which is once a trace.
    fn calls(during: impl FnOnce() -> Result<()>) -> Result<u32> {
        let before = CALLS.get();
        during()?;
        Ok(CALLS.get() - before)
    }

    #[test]
    fn a_trace_serves_every_shape_of_its_dtype_and_rank() -> Result<()> {
        let fused = Fused::new(counted);
        let call = |shape: &[i32]| {
            calls(|| fused.call(Activation::Silu, &[Array::ones::<f32>(shape)?]).map(drop))
        };
        assert_eq!(call(&[2, 3])?, 1);
        assert_eq!(call(&[2, 3])?, 0);
        assert_eq!(call(&[5, 1])?, 0);
        assert_eq!(call(&[5])?, 1);
        Ok(())
    }

    #[test]
    fn an_empty_array_is_left_to_the_formula() -> Result<()> {
        let fused = Fused::new(counted);
        let (nothing, row) = (Array::ones::<f32>(&[0, 3])?, Array::ones::<f32>(&[1, 3])?);
        for inputs in [[nothing.clone(), row.clone()], [row, nothing]] {
            for _ in 0..2 {
                let call = || fused.call(Activation::Silu, &inputs).map(drop);
                assert_eq!(calls(call)?, 1);
            }
        }
        Ok(())
    }

    #[test]
    fn a_trace_does_not_outlive_its_stream() -> Result<()> {
        let fused = Fused::new(counted);
        let x = [Array::ones::<f32>(&[4])?];
        let call = || calls(|| fused.call(Activation::Silu, &x).map(drop));
        assert_eq!(call()?, 1);
        assert_eq!(
            with_device(Device::cpu(), || call().and_then(|first| Ok((first, call()?))))?,
            (1, 0)
        );
        assert_eq!(call()?, 1);
        Ok(())
    }

    #[test]
    fn a_gradient_is_that_of_the_formula() -> Result<()> {
        let fused = Fused::new(counted);
        let x = [Array::ones::<f32>(&[4])?];
        fused.call(Activation::Silu, &x)?;
        let again = calls(|| {
            let f = |x: &[Array]| Ok(vec![fused.call(Activation::Silu, x)?]);
            Ok(fallible_vjp(f, &x, &x).map(drop)?)
        });
        assert_eq!(again?, 1);
        Ok(())
    }
}
