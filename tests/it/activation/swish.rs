use mlx_primitives::{
    Error,
    activation::{Swish, SwishBuilder, swish},
};
use mlx_rs::{Array, Dtype, builder::Builder, module::ModuleParameters};

use super::oracle::sigmoid;
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "swish";
const BETA: f32 = 1.5;

fn oracle(x: &Tensor) -> Tensor {
    let beta = f64::from(BETA);
    Tensor::new(&x.shape, x.values.iter().map(|x| x * sigmoid(beta * x)).collect())
}

#[test]
fn it_matches_the_oracle() {
    for dtype in FLOATING {
        let x = normal(1, &[3, 65], dtype);
        let y = swish(&x, BETA).unwrap();
        assert_eq!(y.dtype(), dtype);
        assert_close(OP, &y, &oracle(&Tensor::of(&x)), Tolerance::of(OP, dtype));
    }
}

#[test]
fn gradients_match_finite_differences() {
    let x = Tensor::of(&normal(1, &[2, 5], Dtype::Float32));
    assert_gradients(OP, &[x], |inputs| oracle(&inputs[0]), |arrays| swish(&arrays[0], BETA));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2], Dtype::Float32);
    assert_eq!(
        swish(&x, f32::NAN).unwrap_err().to_string(),
        "[swish] beta must be finite but got NaN"
    );
    let ints = Array::from_slice(&[1_i32], &[1]);
    assert!(swish(&ints, 1.0).unwrap_err().to_string().starts_with("[swish] x must have dtype"));
    assert!(matches!(Swish::new(f32::INFINITY), Err(Error::Value { argument: "beta", .. })));
}

#[test]
fn a_learnable_slope_trains_saves_and_composes() {
    let module = SwishBuilder::new(BETA).learnable(true).build().unwrap();
    assert_module(module, &normal(5, &[2, 8], Dtype::Float32), &["beta"]);
}

#[test]
fn a_fixed_slope_does_not_train() {
    let module = Swish::new(BETA).unwrap();
    assert!(module.trainable_parameters().flatten().is_empty());
}
