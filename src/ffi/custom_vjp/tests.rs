#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step fails the test, and functions that panic are what is tested"
)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mlx_rs::{
    Dtype, StreamOrDevice,
    transforms::{
        compile::compile, eval, fallible_jvp, fallible_vjp, grad, grad_with_argnums,
        value_and_grad, vjp,
    },
};

use super::{super::vector::Vector, *};

fn scalar(value: f32) -> Array {
    Array::from_f32(value)
}

fn value(array: &Array) -> f32 {
    array.item_exact::<f32>()
}

fn one(arrays: Vec<Array>) -> Result<Array> {
    vector::exactly(arrays).map(|[array]| array)
}

/// `x^2`, with `10 x` for its derivative where `2 x` is right.
fn odd_square(x: &Array) -> Result<Array> {
    one(custom_vjp(
        [x],
        |x| Ok([x[0].square()?]),
        |vjp| {
            let slope = vjp.primals[0].multiply(scalar(10.0))?;
            Ok([slope.multiply(&vjp.cotangents[0])?])
        },
    )?)
}

/// `(a b, a + b)`, with the product's gradient 100 times and the sum's 1000 times what is right.
fn odd_pair(inputs: &[Array]) -> Result<Vec<Array>> {
    custom_vjp(
        inputs,
        |x| Ok([x[0].multiply(&x[1])?, x[0].add(&x[1])?]),
        |vjp| {
            let product = vjp.cotangents[0].multiply(scalar(100.0))?;
            let sum = vjp.cotangents[1].multiply(scalar(1000.0))?;
            let slope = |other: usize| vjp.primals[other].multiply(&product)?.add(&sum);
            Ok([slope(1)?, slope(0)?])
        },
    )
}

#[test]
fn the_value_is_that_of_forward() {
    assert_eq!(value(&odd_square(&scalar(3.0)).unwrap()), 9.0);
}

#[test]
fn grad_uses_backward() {
    let slope = grad(odd_square)(&scalar(3.0)).unwrap();
    assert_eq!(value(&slope), 30.0);
    let slope = grad(|x: &Array| odd_square(x)?.multiply(scalar(2.0)))(&scalar(3.0)).unwrap();
    assert_eq!(value(&slope), 60.0);
}

#[test]
fn value_and_grad_uses_backward() {
    let function = |x: &[Array]| Ok(vec![odd_square(&x[0])?]) as Result<Vec<Array>>;
    let (values, slopes) = value_and_grad(function)(&[scalar(3.0)]).unwrap();
    assert_eq!([value(&values[0]), value(&slopes[0])], [9.0, 30.0]);
}

#[test]
fn vjp_uses_backward_for_each_output() {
    let inputs = [scalar(2.0), scalar(3.0)];
    let (values, slopes) = fallible_vjp(odd_pair, &inputs, &[scalar(1.0), scalar(1.0)]).unwrap();
    assert_eq!([value(&values[0]), value(&values[1])], [6.0, 5.0]);
    assert_eq!([value(&slopes[0]), value(&slopes[1])], [1300.0, 1200.0]);
}

#[test]
fn an_output_that_is_not_used_has_a_zero_cotangent() {
    let product = |x: &[Array]| Ok(odd_pair(x)?[0].clone()) as Result<Array>;
    let inputs = [scalar(2.0), scalar(3.0)];
    let slopes: Vec<Array> =
        grad_with_argnums(move |x: &[Array]| product(x).map(|y| vec![y]), &[0, 1])(&inputs)
            .unwrap();
    assert_eq!([value(&slopes[0]), value(&slopes[1])], [300.0, 200.0]);
}

#[test]
fn backward_sees_what_forward_returned() {
    let exp = |x: &Array| {
        one(custom_vjp(
            [x],
            |x| Ok([x[0].exp()?]),
            |vjp| Ok([vjp.outputs[0].multiply(&vjp.cotangents[0])?]),
        )?)
    };
    let x = scalar(0.5);
    let slope = value(&grad(exp)(&x).unwrap());
    assert_eq!(slope, value(&x.exp().unwrap()));
    // The gradient of the gradient goes through `outputs`, and so through this gradient again.
    let second = grad(move |x: &Array| grad(exp)(x))(&x).unwrap();
    assert_eq!(value(&second), slope);
}

#[test]
fn the_gradient_of_the_gradient_is_that_of_backward() {
    let second = grad(|x: &Array| grad(odd_square)(x))(&scalar(3.0)).unwrap();
    assert_eq!(value(&second), 10.0);
    let third = grad(|x: &Array| grad(|x: &Array| grad(odd_square)(x))(x))(&scalar(3.0)).unwrap();
    assert_eq!(value(&third), 0.0);
}

#[test]
fn calls_compose_and_nest() {
    let twice = |x: &Array| odd_square(&odd_square(x)?);
    // 10 (x^2) * 10 x at x = 2.
    assert_eq!(value(&grad(twice)(&scalar(2.0)).unwrap()), 800.0);
    // A gradient computed by a function with a gradient of its own.
    let nested = |x: &Array| {
        one(custom_vjp(
            [x],
            |x| Ok([odd_square(&x[0])?]),
            |vjp| Ok([grad(odd_square)(&vjp.primals[0])?.multiply(&vjp.cotangents[0])?]),
        )?)
    };
    assert_eq!(value(&grad(nested)(&scalar(2.0)).unwrap()), 20.0);
}

#[test]
fn compiled_functions_use_backward_and_nothing_is_evaluated() {
    // MLX refuses to evaluate while it compiles, so this would fail if anything did.
    let mut compiled = compile(|x: &Array| grad(odd_square)(x), None);
    for x in [1.0, 2.0, 3.0] {
        assert_eq!(value(&compiled(&scalar(x)).unwrap()), 10.0 * x);
    }
    let mut compiled = compile(|x: &Array| odd_square(x)?.add(scalar(1.0)), None);
    assert_eq!(value(&compiled(&scalar(3.0)).unwrap()), 10.0);
    let slope = grad(move |x: &Array| compiled(x))(&scalar(3.0)).unwrap();
    assert_eq!(value(&slope), 30.0);
}

#[test]
fn an_input_that_needs_no_gradient_may_have_none() {
    let gather = |inputs: &[Array]| -> Result<Vec<Array>> {
        custom_vjp(
            inputs,
            |x| Ok([x[0].take_axis(&x[1], 0)?]),
            |vjp| {
                let ones = zeros_like(&vjp.primals[0])?.add(scalar(1.0))?;
                Ok([Some(ones), None])
            },
        )
    };
    let table = Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3]);
    let indices = Array::from_slice(&[2_u32, 0], &[2]);
    let cotangent = Array::from_slice(&[1.0_f32, 1.0], &[2]);
    let (values, slopes) = fallible_vjp(gather, &[table, indices], &[cotangent]).unwrap();
    assert_eq!(values[0].as_slice::<f32>(), [3.0, 1.0]);
    assert_eq!(slopes[0].as_slice::<f32>(), [1.0; 3]);
    assert_eq!(slopes[1].as_slice::<u32>(), [0; 2]);
    assert_eq!(slopes[1].dtype(), Dtype::Uint32);
}

#[test]
fn no_gradient_is_asked_for_where_none_is_needed() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = runs.clone();
    let function = move |x: &[Array]| -> Result<Vec<Array>> {
        let counter = counter.clone();
        let constant = one(custom_vjp(
            [&x[1]],
            |x| Ok([x[0].square()?]),
            move |vjp| {
                counter.fetch_add(1, Ordering::SeqCst);
                Ok(vjp.primals.to_vec())
            },
        )?)?;
        Ok(vec![constant.multiply(&x[0])?])
    };
    let slopes: Vec<Array> = grad(function)(&[scalar(2.0), scalar(3.0)]).unwrap();
    assert_eq!(value(&slopes[0]), 9.0);
    assert_eq!(runs.load(Ordering::SeqCst), 0);
}

#[test]
fn captured_arrays_have_no_gradient() {
    let function = |x: &[Array]| -> Result<Vec<Array>> {
        let captured = x[0].clone();
        custom_vjp(
            [&x[1]],
            move |x| Ok([x[0].multiply(&captured)?]),
            |vjp| Ok(vjp.cotangents.to_vec()),
        )
    };
    let slopes: Vec<Array> = grad(function)(&[scalar(2.0), scalar(3.0)]).unwrap();
    assert_eq!(value(&slopes[0]), 0.0);
}

/// The error of the gradient of a function with this backward, which is one when compiled too.
fn error_of_backward<Gradients>(
    backward: impl Fn(Vjp<'_>) -> Result<Gradients> + Send + Clone + 'static,
) -> String
where
    Gradients: IntoIterator<Item: Into<Option<Array>>> + 'static,
{
    let function =
        move |x: &Array| one(custom_vjp([x, x], |x| Ok([x[0].square()?]), backward.clone())?);
    let error = grad(function.clone())(&scalar(3.0)).unwrap_err();
    // mlx-rs does not read the text of an error in a compiled function; it hands it to whatever transform fails next on
    // that thread.
    let compiled = std::thread::spawn(move || {
        compile(move |x: &Array| grad(function.clone())(x), None)(&scalar(3.0)).is_err()
    });
    assert!(compiled.join().unwrap());
    error.what().to_owned()
}

#[test]
fn errors_and_panics_of_backward_come_out_of_the_transform() {
    let text = error_of_backward(|_| Err::<Vec<Array>, _>(Exception::custom("no slope: 5%s")));
    assert_eq!(text, "no slope: 5%s");
    let text = error_of_backward(|vjp| -> Result<Vec<Array>> { panic!("{}", vjp.primals.len()) });
    assert_eq!(text, "a closure called by MLX panicked: 2");
    let text = error_of_backward(|vjp| Ok([vjp.primals[0].reshape(&[5])?]));
    assert!(text.starts_with("[reshape]"), "{text}");
}

#[test]
fn gradients_that_do_not_fit_are_errors() {
    let text = error_of_backward(|vjp| Ok([vjp.cotangents[0].clone()]));
    let must = "[custom_vjp] backward must return 2 gradients, one for each input, but got ";
    assert_eq!(text, format!("{must}1"));
    assert_eq!(error_of_backward(|_| Ok(Vec::<Array>::new())), format!("{must}0"));
    let text = error_of_backward(|vjp| Ok(vec![vjp.primals[0].clone(); 3]));
    assert_eq!(text, format!("{must}3"));

    let text = error_of_backward(|vjp| Ok([None, Some(vjp.primals[0].reshape(&[1])?)]));
    assert!(text.contains("gradient 1 must have shape [] and type Float32"), "{text}");
    assert!(text.ends_with("but got [1] and Float32"), "{text}");
    let text = error_of_backward(|vjp| Ok([Some(vjp.primals[0].as_type::<i32>()?), None]));
    assert!(text.ends_with("but got [] and Int32"), "{text}");
}

#[test]
fn errors_and_panics_of_forward_come_out_of_the_call() {
    fn error_of<O: IntoIterator<Item = Array>>(
        forward: impl Fn(&[Array]) -> Result<O> + Send + Clone + 'static,
    ) -> String {
        let call =
            move |x: &Array| custom_vjp([x], forward.clone(), |vjp| Ok(vjp.primals.to_vec()));
        let plain = call(&scalar(3.0)).unwrap_err();
        let inside = grad(move |x: &Array| one(call(x)?))(&scalar(3.0)).unwrap_err();
        assert_eq!(plain.what(), inside.what());
        plain.what().to_owned()
    }
    assert_eq!(error_of(|_| Err::<Vec<_>, _>(Exception::custom("no value"))), "no value");
    let text = error_of(|_| -> Result<Vec<Array>> { panic!("value") });
    assert_eq!(text, "a closure called by MLX panicked: value");
    let text = error_of(|_| Ok(Vec::new()));
    assert_eq!(text, "[custom_vjp] the function must return at least one array");
}

#[test]
fn no_inputs_are_inputs_too() {
    let none: [&Array; 0] = [];
    let outputs = custom_vjp(none, |_| Ok([scalar(4.0)]), |_| Ok(Vec::<Array>::new()));
    assert_eq!(value(&outputs.unwrap()[0]), 4.0);
}

#[test]
fn jvp_differentiates_forward() {
    let function = |x: &[Array]| Ok(vec![odd_square(&x[0])?]) as Result<Vec<Array>>;
    let (values, tangents) = fallible_jvp(function, &[scalar(3.0)], &[scalar(1.0)]).unwrap();
    assert_eq!([value(&values[0]), value(&tangents[0])], [9.0, 6.0]);
}

#[test]
fn a_forward_that_returns_more_the_second_time_is_an_error() {
    let function = |x: &[Array]| -> Result<Vec<Array>> {
        let runs = AtomicUsize::new(0);
        custom_vjp(
            x,
            move |x| Ok(vec![x[0].clone(); 1 + runs.fetch_add(1, Ordering::SeqCst)]),
            |vjp| Ok(vjp.cotangents.to_vec()),
        )
    };
    let error = fallible_jvp(function, &[scalar(3.0)], &[scalar(1.0)]).unwrap_err();
    let text = "[custom_vjp] the function must return 1 arrays, as it did before, but got 2";
    assert_eq!(error.what(), text);
}

/// `function` vectorized over the first axis, which mlx-rs has no function for.
fn vmap(
    function: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    input: &Array,
) -> Result<Vec<Array>> {
    let function = Closure::new(function)?;
    let inputs = Vector::from_arrays([input])?;
    let mut traced = mlx_vector_array { ctx: ptr::null_mut() };
    // SAFETY: all handles are alive for the whole call; MLX writes both lists or neither.
    let outputs = Vector::out(|res| unsafe {
        mlx_sys::mlx_detail_vmap_trace(&mut traced, res, function.as_ptr(), inputs.as_ptr(), &0, 1)
    })?;
    let traced = Vector::out(|res| {
        // SAFETY: `res` is the slot of `out`.
        unsafe { *res = traced };
        0
    })?;
    let axes = vec![0; outputs.to_arrays()?.len()];
    let (inputs, traced, outputs) = (inputs.as_ptr(), traced.as_ptr(), outputs.as_ptr());
    // SAFETY: the lists are alive for the whole call, and the axes as many as said.
    let mapped = Vector::out(|res| unsafe {
        mlx_sys::mlx_detail_vmap_replace(
            res,
            inputs,
            traced,
            outputs,
            &0,
            1,
            axes.as_ptr(),
            axes.len(),
        )
    })?;
    mapped.to_arrays()
}

#[test]
fn vmap_vectorizes_forward_and_the_gradient_of_a_function() {
    let inputs = Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3]);
    let values = vmap(|x| Ok(vec![odd_square(&x[0])?]), &inputs).unwrap();
    assert_eq!(values[0].as_slice::<f32>(), [1.0, 4.0, 9.0]);
    let slopes = vmap(|x| Ok(vec![grad(odd_square)(&x[0])?]), &inputs).unwrap();
    assert_eq!(slopes[0].as_slice::<f32>(), [10.0, 20.0, 30.0]);
}

#[test]
fn the_gradient_of_a_vmap_is_that_of_forward() {
    let function =
        |x: &[Array]| Ok(vec![vmap(|x| Ok(vec![odd_square(&x[0])?]), &x[0])?[0].sum(None)?]);
    let inputs = [Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3])];
    let (_, slopes) = fallible_vjp(function, &inputs, &[scalar(1.0)]).unwrap();
    assert_eq!(slopes[0].as_slice::<f32>(), [2.0, 4.0, 6.0]);
}

#[test]
fn a_function_for_the_infallible_transforms_works() {
    let function = |x: &[Array]| vec![odd_square(&x[0]).unwrap()];
    let (_, slopes) = vjp(function, &[scalar(3.0)], &[scalar(1.0)]).unwrap();
    assert_eq!(value(&slopes[0]), 30.0);
}

#[test]
fn every_thread_has_its_own_transforms() {
    let threads: Vec<_> = (1..=4_u8)
        .map(|x| {
            std::thread::spawn(move || {
                for _ in 0..50 {
                    let x = f32::from(x);
                    assert_eq!(value(&grad(odd_square)(&scalar(x)).unwrap()), 10.0 * x);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_graph_may_be_dropped_by_another_thread() {
    let lazy = odd_square(&scalar(3.0)).unwrap();
    std::thread::spawn(move || drop(lazy)).join().unwrap();
}

#[test]
fn both_closures_are_dropped_once_the_graph_is() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let drops = Arc::new(AtomicUsize::new(0));
    let function = {
        let drops = drops.clone();
        move |x: &Array| -> Result<Array> {
            let (forward, backward) = (Counted(drops.clone()), Counted(drops.clone()));
            one(custom_vjp(
                [x],
                move |x| {
                    let _ = &forward;
                    Ok([x[0].square()?])
                },
                move |vjp| {
                    let _ = &backward;
                    Ok([vjp.primals[0].clone()])
                },
            )?)
        }
    };
    let lazy = function(&scalar(3.0)).unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(lazy);
    assert_eq!(drops.load(Ordering::SeqCst), 2);

    for _ in 0..100 {
        let slope = grad(function.clone())(&scalar(3.0)).unwrap();
        eval([&slope]).unwrap();
    }
    // The thread that evaluated may be the last to let go.
    let deadline = Instant::now() + Duration::from_secs(10);
    while drops.load(Ordering::SeqCst) < 202 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(drops.load(Ordering::SeqCst), 202);
}

#[test]
fn other_streams_may_be_current() {
    let slope =
        mlx_rs::with_stream(StreamOrDevice::cpu().as_ref(), || grad(odd_square)(&scalar(3.0)));
    assert_eq!(value(&slope.unwrap()), 30.0);
}
