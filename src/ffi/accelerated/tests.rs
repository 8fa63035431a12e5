#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use mlx_rs::{
    error::Exception,
    transforms::{compile::compile, fallible_jvp, fallible_vjp, grad},
};

use super::*;

/// What `fast` adds and `backward` multiplies by, so that a result tells which function it came from.
const FAST: f32 = 1000.0;
const BACKWARD: f32 = 100.0;

/// `x² · w`.
fn reference(x: &[Array]) -> Result<Vec<Array>> {
    Ok(vec![x[0].square()?.multiply(&x[1])?])
}

fn fast(x: &[Array]) -> Result<Vec<Array>> {
    Ok(vec![reference(x)?[0].add(Array::from_f32(FAST))?])
}

fn backward(vjp: Vjp<'_>) -> Result<Vec<Array>> {
    let [x, w] = [&vjp.primals[0], &vjp.primals[1]];
    let c = vjp.cotangents[0].multiply(Array::from_f32(BACKWARD))?;
    Ok(vec![x.multiply(w)?.multiply(&c)?.multiply(Array::from_f32(2.0))?, x.square()?.multiply(c)?])
}

fn with_backward(x: &[Array]) -> Result<Vec<Array>> {
    accelerated(x, fast, Some(backward), reference)
}

fn without_backward(x: &[Array]) -> Result<Vec<Array>> {
    accelerated(x, fast, None::<fn(Vjp<'_>) -> Result<Vec<Array>>>, reference)
}

fn inputs() -> [Array; 2] {
    [Array::from_slice(&[1.0_f32, 2.0, 3.0], &[3]), Array::from_slice(&[2.0_f32, 3.0, 4.0], &[3])]
}

fn ones() -> [Array; 1] {
    [Array::from_slice(&[1.0_f32; 3], &[3])]
}

fn values(array: &Array) -> Vec<f32> {
    array.flatten(None, None).unwrap().to_vec_exact::<f32>().unwrap()
}

#[test]
fn the_value_is_the_fast_one() {
    assert_eq!(values(&with_backward(&inputs()).unwrap()[0]), [1002.0, 1012.0, 1036.0]);
}

#[test]
fn the_gradient_is_the_backward_one() {
    let (_, gradients) = fallible_vjp(with_backward, &inputs(), &ones()).unwrap();
    assert_eq!(values(&gradients[0]), [4.0 * 100.0, 12.0 * 100.0, 24.0 * 100.0]);
    assert_eq!(values(&gradients[1]), [100.0, 4.0 * 100.0, 9.0 * 100.0]);
}

#[test]
fn without_one_the_gradient_is_that_of_the_reference() {
    let (_, gradients) = fallible_vjp(without_backward, &inputs(), &ones()).unwrap();
    assert_eq!(values(&gradients[0]), [4.0, 12.0, 24.0]);
    assert_eq!(values(&gradients[1]), [1.0, 4.0, 9.0]);
}

#[test]
fn the_gradient_of_the_gradient_is_that_of_the_reference() {
    let slope = |x: &Array| -> Result<Array> {
        let w = Array::from_f32(3.0);
        grad(move |x: &Array| -> Result<Array> {
            Ok(with_backward(&[x.clone(), w.clone()])?[0].clone())
        })(x)
    };
    let second = grad(slope)(&Array::from_f32(2.0)).unwrap();
    assert_eq!(second.item_exact::<f32>(), 6.0);
}

/// The gradients of a sum are one array, which as two results of a function MLX would take for one.
#[test]
fn the_gradient_of_either_of_two_equal_gradients_is_right() {
    let cubed = |all: &[Array]| -> Result<Vec<Array>> {
        let sum = all[0].add(&all[1])?;
        Ok(vec![sum.square()?.multiply(&sum)?])
    };
    let backward = |vjp: Vjp<'_>| -> Result<Vec<Array>> {
        let sum = vjp.primals[0].add(&vjp.primals[1])?;
        let slope = sum.square()?.multiply(Array::from_f32(3.0))?.multiply(&vjp.cotangents[0])?;
        Ok(vec![slope.clone(), slope])
    };
    let gradients = |all: &[Array]| -> Result<Vec<Array>> {
        let function = |all: &[Array]| accelerated(all, cubed, Some(backward), cubed);
        let one = Array::from_f32(1.0);
        Ok(fallible_vjp(function, all, &[one])?.1)
    };
    let inputs = [2.0, 1.0].map(Array::from_f32);
    for (weights, expected) in [([1.0, 0.0], 18.0), ([0.0, 1.0], 18.0), ([1.0, 1.0], 36.0)] {
        let (_, second) = fallible_vjp(gradients, &inputs, &weights.map(Array::from_f32)).unwrap();
        let found = [0, 1].map(|index: usize| second[index].clone().item_exact::<f32>());
        assert_eq!(found, [expected; 2], "{weights:?}");
    }
}

#[test]
fn forward_mode_is_that_of_the_reference() {
    let (_, slopes) = fallible_jvp(with_backward, &inputs(), &inputs()).unwrap();
    // d(x²·w) along (x, w) is 3·x²·w.
    assert_eq!(values(&slopes[0]), [6.0, 36.0, 108.0]);
}

#[test]
fn forward_mode_along_one_input_leaves_the_other() {
    let w = inputs()[1].clone();
    let of_x = move |x: &[Array]| with_backward(&[x[0].clone(), w.clone()]);
    let (_, slopes) = fallible_jvp(of_x, &inputs()[..1], &ones()).unwrap();
    assert_eq!(values(&slopes[0]), [4.0, 12.0, 24.0]);
}

#[test]
fn vectorization_is_that_of_the_reference() {
    let function = Closure::new(with_backward).unwrap();
    let x = Array::from_slice(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[3, 2]);
    let w = Array::from_slice(&[1.0_f32, 10.0, 100.0], &[3]);
    let y = transform::vmap(&function, &[x, w], &[1, -1]).unwrap();
    assert_eq!(y[0].shape(), [2, 3]);
    assert_eq!(values(&y[0]), [1.0, 90.0, 2500.0, 4.0, 160.0, 3600.0]);
}

#[test]
fn a_vectorized_gradient_is_that_of_the_reference() {
    let gradient = |all: &[Array]| {
        let (_, gradients) = fallible_vjp(with_backward, &all[..2], &all[2..])?;
        Ok(gradients)
    };
    let function = Closure::new(gradient).unwrap();
    let [x, w] = inputs();
    let [c] = ones();
    let both = |array: &Array| mlx_rs::ops::stack(&[array, array], 0).unwrap();
    let gradients =
        transform::vmap(&function, &[both(&x), both(&w), both(&c)], &[0, 0, 0]).unwrap();
    assert_eq!(values(&gradients[0]), [4.0, 12.0, 24.0, 4.0, 12.0, 24.0]);
}

#[test]
fn a_compiled_call_is_the_fast_one_with_the_backward_gradient() {
    let both = |x: &[Array]| -> Result<Vec<Array>> {
        let (mut outputs, gradients) = fallible_vjp(with_backward, x, &ones())?;
        outputs.extend(gradients);
        Ok(outputs)
    };
    let compiled = compile(both, None)(&inputs()).unwrap();
    assert_eq!(values(&compiled[0]), [1002.0, 1012.0, 1036.0]);
    assert_eq!(values(&compiled[1]), [4.0 * 100.0, 12.0 * 100.0, 24.0 * 100.0]);
}

#[test]
fn errors_come_out_as_they_went_in() {
    let fails = |_: &[Array]| -> Result<Vec<Array>> { Err(Exception::custom("no kernel")) };
    let call = accelerated(&inputs(), fails, Some(backward), reference);
    assert_eq!(call.unwrap_err().what(), "no kernel");
    let function = move |x: &[Array]| accelerated(x, fast, Some(backward), fails);
    let mapped = transform::vmap(&Closure::new(function).unwrap(), &inputs(), &[0, 0]);
    assert_eq!(mapped.unwrap_err().what(), "no kernel");
}
