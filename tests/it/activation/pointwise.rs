use mlx_primitives::{
    Result,
    activation::{self, Activation},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    module::{Module, ModuleParameters},
    nn,
    transforms::{compile::compile, vjp},
};

use super::oracle::activate;
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "activation";

fn oracle(activation: Activation, x: &Tensor) -> Tensor {
    Tensor::new(&x.shape, x.values.iter().map(|&value| activate(activation, value)).collect())
}

/// Wide enough to reach every corner and tail.
fn sample(shape: &[i32], dtype: Dtype) -> Array {
    let wide =
        Tensor::of(&normal(1, shape, Dtype::Float32)).values.iter().map(|v| 3.0 * v).collect();
    let shape: Vec<_> = shape.iter().map(|&size| size as usize).collect();
    Tensor::new(&shape, wide).to_array(dtype)
}

fn matches_the_oracle(activation: Activation, case: &str, x: &Array) {
    let expected = oracle(activation, &Tensor::of(x));
    on_each_backend(
        OP,
        |dispatch| activation.apply_on(x, dispatch),
        |backend, y| {
            assert_eq!(y.dtype(), x.dtype(), "{activation}");
            let what = format!("{activation} {case} {:?} on {backend}", x.dtype());
            assert_close(&what, &y, &expected, Tolerance::of(OP, x.dtype()));
        },
    );
}

#[test]
fn every_backend_matches_the_oracle() {
    for &activation in Activation::ALL {
        for dtype in FLOATING {
            matches_the_oracle(activation, "[1000]", &sample(&[1000], dtype));
        }
    }
}

#[test]
fn any_shape_will_do() {
    for shape in [&[][..], &[1], &[0], &[0, 8], &[3, 0, 2], &[2, 3, 1, 5], &[1023], &[1025]] {
        let x = sample(shape, Dtype::Float32);
        matches_the_oracle(Activation::Silu, &format!("{shape:?}"), &x);
    }
    let x = sample(&[3, 65], Dtype::Float32);
    matches_the_oracle(Activation::Silu, "strided", &strided(&x));
    matches_the_oracle(Activation::Silu, "transposed", &x.transpose().unwrap());
}

#[test]
fn gradients_match_finite_differences() {
    let x = Tensor::of(&sample(&[40], Dtype::Float32));
    for &activation in Activation::ALL {
        gradients_on_each_backend(
            OP,
            std::slice::from_ref(&x),
            |inputs| oracle(activation, &inputs[0]),
            |arrays, dispatch| activation.apply_on(&arrays[0], dispatch),
        );
    }
}

#[test]
fn values_and_slopes_stay_right_far_from_zero() {
    const FAR: [f64; 10] = [-1e4, -1000.0, -100.0, -89.0, -20.0, 20.0, 89.0, 100.0, 1000.0, 1e4];
    let x = Tensor::new(&[FAR.len()], FAR.to_vec());
    let array = x.to_array(Dtype::Float32);
    for &activation in Activation::ALL {
        matches_the_oracle(activation, "far", &array);
        let step = 0.5;
        let slopes = FAR.map(|x| {
            (activate(activation, x + step) - activate(activation, x - step)) / (2.0 * step)
        });
        on_each_backend(
            OP,
            |dispatch| slope_of(&array, |x| activation.apply_on(x, dispatch)),
            |backend, slope| {
                let expected = Tensor::new(&x.shape, slopes.to_vec());
                let what = format!("slope of {activation} far on {backend}");
                assert_close(&what, &slope, &expected, Tolerance::of(OP, Dtype::Float32));
            },
        );
    }
}

/// Refusals come from a plain call: a transformation would turn them into exceptions.
fn slope_of(x: &Array, f: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
    f(x)?;
    let cotangent = Array::ones::<f32>(x.shape()).unwrap();
    let (_, slopes) =
        vjp(|inputs| vec![f(&inputs[0]).unwrap()], std::slice::from_ref(x), &[cotangent]).unwrap();
    Ok(slopes[0].clone())
}

#[test]
fn each_function_is_its_activation() {
    type Function = fn(&Array) -> Result<Array>;
    let functions: [(Activation, Function); 14] = [
        (Activation::Relu, |x| activation::relu(x)),
        (Activation::Relu6, |x| activation::relu6(x)),
        (Activation::ReluSquared, |x| activation::relu_squared(x)),
        (Activation::LeakyRelu, |x| activation::leaky_relu(x)),
        (Activation::Sigmoid, |x| activation::sigmoid(x)),
        (Activation::Tanh, |x| activation::tanh(x)),
        (Activation::Silu, |x| activation::silu(x)),
        (Activation::Gelu, |x| activation::gelu(x)),
        (Activation::GeluTanh, |x| activation::gelu_tanh(x)),
        (Activation::QuickGelu, |x| activation::quick_gelu(x)),
        (Activation::Mish, |x| activation::mish(x)),
        (Activation::Softplus, |x| activation::softplus(x)),
        (Activation::HardSigmoid, |x| activation::hard_sigmoid(x)),
        (Activation::HardSwish, |x| activation::hard_swish(x)),
    ];
    let x = sample(&[64], Dtype::Float32);
    for (activation, function) in functions {
        let expected = oracle(activation, &Tensor::of(&x));
        let what = activation.to_string();
        assert_close(&what, &function(&x).unwrap(), &expected, Tolerance::of(OP, x.dtype()));
    }
}

#[test]
fn it_compiles() {
    let gelu = |x: &Array| -> Result<Array, Exception> { Ok(activation::gelu(x)?) };
    let x = sample(&[3, 8], Dtype::Float32);
    let compiled = compile(gelu, None)(&x).unwrap();
    let expected = oracle(Activation::Gelu, &Tensor::of(&x));
    assert_close("compiled gelu", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn a_fused_formula_is_made_anew_on_each_thread() {
    for _ in 0..4 {
        let worker =
            || matches_the_oracle(Activation::Silu, "threads", &sample(&[64], Dtype::Float32));
        std::thread::spawn(worker).join().unwrap();
    }
}

#[test]
fn bad_input_is_an_error_that_names_the_function() {
    let ints = Array::from_slice(&[1_i32], &[1]);
    assert_eq!(
        activation::silu(&ints).unwrap_err().to_string(),
        "[silu] x must have dtype Float32 or Float16 or Bfloat16 but got Int32"
    );
}

#[test]
fn it_is_a_module_without_parameters() {
    let x = sample(&[2, 8], Dtype::Float32);
    let mut sequence = nn::Sequential::new().append(Activation::Silu).append(Activation::Tanh);
    assert_eq!(sequence.parameters().flatten().len(), 0);
    assert_eq!(Activation::Silu.all_frozen(), None);
    let expected = oracle(Activation::Tanh, &oracle(Activation::Silu, &Tensor::of(&x)));
    let y = sequence.forward(&x).unwrap();
    assert_close("in Sequential", &y, &expected, Tolerance::of(OP, Dtype::Float32));
}
