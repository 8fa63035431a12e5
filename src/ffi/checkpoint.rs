//! Recomputation in place of stored activations.

use mlx_rs::{Array, Dtype, error::Result};

use super::{array, closure::Closure, custom_vjp::counted, stream};

/// Computes `function(inputs)`, keeping nothing of what it computes on the way: a gradient runs `function` again.
///
/// Gradients are those of `function`, at the price of one more forward pass, and bit for bit, save that an input of
/// several calls may have its gradients added up in another order. What is saved are the intermediate results of all
/// calls but a few: worth it where a model is many calls deep. Calls nest, and work inside
/// `mlx_rs::transforms::compile::compile`.
///
/// - Only `inputs` have a gradient. Arrays that `function` captures, such as the weights of a module, are constants:
///   pass what is to be trained.
/// - `function` must compute the same each time. One that draws from the global random state draws anew in the second
///   run; pass it a key.
/// - Inputs that are not floating point get no gradient, so that indices may be passed to any operation.
///
/// # Errors
///
/// What `function` returns, now or in the transform that runs it again; no output.
pub(crate) fn checkpoint<Outputs>(
    function: impl Fn(&[Array]) -> Result<Outputs> + Send + 'static,
    inputs: impl IntoIterator<Item = impl AsRef<Array>>,
) -> Result<Vec<Array>>
where
    Outputs: IntoIterator<Item = Array>,
{
    let function = Closure::new(counted("checkpoint", move |inputs: &[Array]| {
        let inputs = inputs.iter().map(|input| {
            if is_differentiable(input.dtype()) { Ok(input.clone()) } else { stop_gradient(input) }
        });
        function(&inputs.collect::<Result<Vec<_>>>()?)
    }))?;
    // SAFETY: the closure is alive for the whole call; the new one keeps a reference of its own.
    let function = Closure::out(|res| unsafe { mlx_sys::mlx_checkpoint(res, function.as_ptr()) })?;
    function.call(inputs)
}

/// The same values, with no gradient flowing through them.
fn stop_gradient(array: &Array) -> Result<Array> {
    let stream = stream::current();
    // SAFETY: the array and the stream are alive for the whole call.
    array::out(|res| unsafe { mlx_sys::mlx_stop_gradient(res, array.as_ptr(), stream.as_ptr()) })
}

/// Whether a gradient with respect to an array of this type means anything.
fn is_differentiable(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::Float16 | Dtype::Bfloat16 | Dtype::Float32 | Dtype::Float64 | Dtype::Complex64
    )
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        reason = "a failed step fails the test, and functions that panic are what is tested"
    )]

    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use mlx_rs::{
        error::Exception,
        memory,
        ops::indexing::IndexOp,
        transforms::{compile::compile, eval, fallible_jvp, fallible_vjp, grad},
    };

    use super::*;

    /// Three layers on `x` with the weights `w`.
    fn block(inputs: &[Array]) -> Result<Vec<Array>> {
        let [x, w] = inputs else {
            return Err(Exception::custom("a block has two inputs"));
        };
        let mut y = x.clone();
        for _ in 0..3 {
            y = y.matmul(w)?.sin()?.add(x)?;
        }
        Ok(vec![y])
    }

    fn wave(count: u16, shape: &[i32]) -> Array {
        let values: Vec<f32> = (0..count).map(|i| (f32::from(i) * 0.7).sin()).collect();
        Array::from_slice(&values, shape)
    }

    fn inputs() -> [Array; 3] {
        [wave(48, &[6, 8]), wave(64, &[8, 8]), wave(72, &[9, 8]).index((1.., ..))]
    }

    /// The sum of `function` and its gradients with respect to all inputs, evaluated.
    fn gradients(function: impl Fn(&[Array]) -> Result<Vec<Array>>) -> Vec<Vec<f32>> {
        let inputs = inputs();
        let sum = |x: &[Array]| Ok(vec![function(x)?[0].sum(None)?]);
        let (values, slopes) = fallible_vjp(sum, &inputs, &[Array::from_f32(1.0)]).unwrap();
        let arrays = values.iter().chain(&slopes);
        arrays.map(|array| array.flatten(None, None).unwrap().as_slice::<f32>().to_vec()).collect()
    }

    fn chain(x: &[Array]) -> Result<Vec<Array>> {
        let y = block(&x[..2])?;
        block(&[y[0].clone(), x[2].clone()])
    }

    fn checkpointed_chain(x: &[Array]) -> Result<Vec<Array>> {
        let y = checkpoint(block, &x[..2])?;
        checkpoint(block, [&y[0], &x[2]])
    }

    #[test]
    fn gradients_are_the_plain_ones_bit_for_bit() {
        let plain = gradients(chain);
        assert_eq!(gradients(checkpointed_chain), plain);
        assert_eq!(gradients(|x| checkpoint(chain, x)), plain);
    }

    #[test]
    fn checkpoints_nest() {
        assert_eq!(gradients(|x| checkpoint(checkpointed_chain, x)), gradients(chain));
    }

    #[test]
    fn compiled_gradients_agree() {
        let inputs = inputs();
        let slope = |function: fn(&[Array]) -> Result<Vec<Array>>| {
            move |x: &[Array]| -> Result<Vec<Array>> {
                grad(move |x: &[Array]| Ok(vec![function(x)?[0].sum(None)?]) as Result<Vec<Array>>)(
                    x,
                )
            }
        };
        let plain = slope(chain)(&inputs).unwrap();
        let compiled = compile(slope(checkpointed_chain), None)(&inputs).unwrap();
        assert!(plain[0].all_close(&compiled[0], 1e-5, 1e-6, None).unwrap());
    }

    #[test]
    fn the_function_runs_again_for_the_gradient_alone() {
        let runs = Arc::new(AtomicUsize::new(0));
        let counter = runs.clone();
        let function = move |x: &Array| -> Result<Array> {
            let counter = counter.clone();
            let [y] = super::super::exactly(checkpoint(
                move |x| {
                    counter.fetch_add(1, Ordering::SeqCst);
                    Ok([x[0].square()?])
                },
                [x],
            )?)?;
            Ok(y)
        };
        let x = Array::from_f32(3.0);
        assert_eq!(function(&x).unwrap().item_exact::<f32>(), 9.0);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        let slope = grad(function)(&x).unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 3);
        assert_eq!(slope.item_exact::<f32>(), 6.0);
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn the_gradient_of_the_gradient_is_right() {
        let cube = |x: &Array| {
            let [y] =
                super::super::exactly(checkpoint(|x| Ok([x[0].power(Array::from_int(3))?]), [x])?)?;
            Ok(y) as Result<Array>
        };
        let second = grad(move |x: &Array| grad(cube)(x))(&Array::from_f32(2.0)).unwrap();
        assert_eq!(second.item_exact::<f32>(), 12.0);
        let function = move |x: &[Array]| Ok(vec![cube(&x[0])?]) as Result<Vec<Array>>;
        let one = [Array::from_f32(1.0)];
        let (_, tangents) = fallible_jvp(function, &one, &one).unwrap();
        assert_eq!(tangents[0].item_exact::<f32>(), 3.0);
    }

    #[test]
    fn indices_may_be_inputs_of_any_operation() {
        // MLX has no gradient of this operation with respect to the indices, and says so when asked.
        let take = |x: &[Array]| Ok([x[0].take_along_axis(&x[1], 0)?]);
        let inputs = [wave(3, &[3]), Array::from_slice(&[2_u32, 0], &[2])];
        let sum =
            move |x: &[Array]| Ok(vec![checkpoint(take, x)?[0].sum(None)?]) as Result<Vec<Array>>;
        let slopes: Vec<Array> = grad(sum)(&inputs).unwrap();
        assert_eq!(slopes[0].as_slice::<f32>(), [1.0, 0.0, 1.0]);
    }

    #[test]
    fn captured_arrays_have_no_gradient() {
        let product = |x: &[Array]| -> Result<Vec<Array>> {
            let captured = x[0].clone();
            checkpoint(move |x| Ok([x[0].multiply(&captured)?]), [&x[1]])
        };
        let inputs = [Array::from_f32(2.0), Array::from_f32(3.0)];
        let slopes: Vec<Array> = grad(product)(&inputs).unwrap();
        assert_eq!(slopes[0].item_exact::<f32>(), 0.0);
    }

    #[test]
    fn errors_and_panics_come_out_of_whoever_runs_the_function() {
        let x = [Array::from_f32(1.0)];
        let error = checkpoint(|_| Err::<Vec<Array>, _>(Exception::custom("first run")), &x);
        assert_eq!(error.unwrap_err().what(), "first run");
        let error = checkpoint(|_| Ok(Vec::new()), &x).unwrap_err();
        assert_eq!(error.what(), "[checkpoint] the function must return at least one array");

        // The second run is that of the gradient.
        let second = |fail: fn() -> Result<()>| {
            let function = move |x: &[Array]| -> Result<Vec<Array>> {
                let runs = AtomicUsize::new(0);
                let run = move |x: &[Array]| {
                    if runs.fetch_add(1, Ordering::SeqCst) > 0 {
                        fail()?;
                    }
                    Ok(x.to_vec())
                };
                checkpoint(run, x)
            };
            let slopes: Result<Vec<Array>> = grad(function)(&x);
            slopes.unwrap_err().what().to_owned()
        };
        assert_eq!(second(|| Err(Exception::custom("second run"))), "second run");
        let text = "a closure called by MLX panicked: second";
        assert_eq!(second(|| panic!("second")), text);
    }

    #[test]
    fn a_deep_chain_needs_less_memory() {
        // 1 MiB an array, so that what other tests hold meanwhile hardly counts.
        const LAYERS: usize = 144;
        const SEGMENT: usize = 12;
        let x = Array::ones::<f32>(&[512, 512]).unwrap();
        eval([&x]).unwrap();
        let segment = |x: &[Array]| -> Result<Vec<Array>> {
            let mut y = x[0].clone();
            for _ in 0..SEGMENT {
                y = y.sin()?;
            }
            Ok(vec![y])
        };
        let peak = |layer: &dyn Fn(&[Array]) -> Result<Vec<Array>>| {
            let deep = |x: &[Array]| -> Result<Vec<Array>> {
                let mut y = x.to_vec();
                for _ in 0..LAYERS / SEGMENT {
                    y = layer(&y)?;
                }
                Ok(vec![y[0].sum(None)?])
            };
            let once = || {
                memory::clear_cache().unwrap();
                memory::reset_peak_memory().unwrap();
                let cotangent = [Array::from_f32(1.0)];
                let (_, slopes) =
                    fallible_vjp(&deep, std::slice::from_ref(&x), &cotangent).unwrap();
                eval(&slopes).unwrap();
                memory::peak_memory().unwrap() >> 20
            };
            // Other tests can only add to it.
            (0..3).map(|_| once()).min().unwrap()
        };
        let plain = peak(&segment);
        let checkpointed = peak(&move |x| checkpoint(segment, x));
        assert!(plain > LAYERS, "{plain} MiB");
        assert!(2 * checkpointed < plain, "{checkpointed} of {plain} MiB");
    }
}
