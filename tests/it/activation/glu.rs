use mlx_primitives::{
    Dispatch, Result,
    activation::{Activation, Glu, GluOptions, geglu, geglu_tanh, glu, reglu, swiglu},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    module::{Module, ModuleParameters},
    transforms::compile::compile,
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

const OP: &str = "glu";

/// The published variants, whose gradients matter most.
const VARIANTS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

struct Case {
    name: &'static str,
    shape: &'static [i32],
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, strided: false }
}

const CASES: &[Case] = &[
    case("scalar", &[]),
    case("one element", &[1]),
    case("no elements", &[0]),
    case("no rows", &[0, 8]),
    case("rank 3", &[2, 3, 9]),
    case("rank 5", &[2, 1, 3, 2, 63]),
    case("7", &[7]),
    case("9", &[9]),
    case("65", &[65]),
    case("1000", &[2, 1000]),
    case("1025", &[2, 1025]),
    case("4095", &[4095]),
    case("4097", &[4097]),
    Case { strided: true, ..case("strided", &[3, 65]) },
];

fn oracle(activation: Activation, gate: &Tensor, up: &Tensor) -> Tensor {
    let products = gate.values.iter().zip(&up.values).map(|(&g, u)| activate(activation, g) * u);
    Tensor::new(&gate.shape, products.collect())
}

fn options<'a>(activation: Activation, dispatch: Dispatch) -> GluOptions<'a> {
    GluOptions { activation, dispatch, ..Default::default() }
}

fn matches_the_oracle(activation: Activation, case: &str, gate: &Array, up: &Array) {
    let expected = oracle(activation, &Tensor::of(gate), &Tensor::of(up));
    on_each_backend(
        OP,
        |dispatch| glu(gate, up, options(activation, dispatch)),
        |backend, y| {
            assert_eq!(y.dtype(), gate.dtype(), "{case}");
            let what = format!("{OP} {activation} {case} {:?} on {backend}", gate.dtype());
            assert_close(&what, &y, &expected, Tolerance::of(OP, gate.dtype()));
        },
    );
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for dtype in FLOATING {
            let arrays = [1, 2].map(|seed| normal(seed, case.shape, dtype));
            let [gate, up] =
                if case.strided { arrays.map(|array| strided(&array)) } else { arrays };
            matches_the_oracle(Activation::Silu, case.name, &gate, &up);
        }
    }
}

#[test]
fn every_activation_matches_the_oracle() {
    let [gate, up] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float32));
    // Wide enough to reach every corner and tail.
    let wide = gate.multiply(Array::from_f32(3.0)).unwrap();
    for &activation in Activation::ALL {
        matches_the_oracle(activation, "[3, 64]", &wide, &up);
    }
}

#[test]
fn a_gate_far_from_zero_is_open_or_shut() {
    let far = [-1e4, -1000.0, -100.0, -89.0, -20.0, 20.0, 89.0, 100.0, 1000.0, 1e4];
    let gate = Array::from_slice(&far, &[10]);
    for &activation in Activation::ALL {
        matches_the_oracle(activation, "far", &gate, &Array::ones::<f32>(&[10]).unwrap());
    }
}

fn add_bias(x: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let Some(bias) = bias else { return x.clone() };
    let sums = x.rows().flat_map(|row| row.iter().zip(&bias.values).map(|(x, bias)| x + bias));
    Tensor::new(&x.shape, sums.collect())
}

#[test]
fn biases_are_added_first() {
    use Dtype::{Bfloat16, Float16, Float32};
    for (shape, dtype, of_bias) in [
        (&[1][..], Float32, Float32),
        (&[2, 3, 9], Float32, Float32),
        (&[40, 64], Bfloat16, Bfloat16),
        (&[3, 257], Float16, Float32),
        (&[17, 1025], Bfloat16, Float16),
        (&[0, 8], Float32, Float32),
    ] {
        let [gate, up] = [1, 2].map(|seed| normal(seed, shape, dtype));
        let width = shape[shape.len() - 1..].to_vec();
        let biases = [3, 4].map(|seed| normal(seed, &width, of_bias));
        for [gate_is, up_is] in [[true, true], [true, false], [false, true]] {
            let gate_bias = gate_is.then_some(&biases[0]);
            let up_bias = up_is.then_some(&biases[1]);
            let expected = oracle(
                Activation::Silu,
                &add_bias(&Tensor::of(&gate), gate_bias.map(Tensor::of).as_ref()),
                &add_bias(&Tensor::of(&up), up_bias.map(Tensor::of).as_ref()),
            );
            let options =
                |dispatch| GluOptions { gate_bias, up_bias, ..options(Activation::Silu, dispatch) };
            on_each_backend(
                OP,
                |dispatch| glu(&gate, &up, options(dispatch)),
                |backend, y| {
                    assert_eq!(y.dtype(), dtype);
                    let what = format!(
                        "{OP} {shape:?} {dtype:?} with {of_bias:?} biases {gate_is} {up_is} on {backend}"
                    );
                    assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                },
            );
        }
    }
}

#[test]
fn gradients_with_biases_match_finite_differences() {
    for (shape, activation) in
        [(&[2, 3, 5][..], Activation::Silu), (&[19, 9], Activation::Gelu), (&[1], Activation::Silu)]
    {
        let width = &shape[shape.len() - 1..];
        let inputs = [(1, shape), (2, shape), (3, width), (4, width)];
        gradients_on_each_backend(
            OP,
            &inputs.map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32))),
            |inputs| {
                let gate = add_bias(&inputs[0], Some(&inputs[2]));
                oracle(activation, &gate, &add_bias(&inputs[1], Some(&inputs[3])))
            },
            |arrays, dispatch| {
                let (gate_bias, up_bias) = (Some(&arrays[2]), Some(&arrays[3]));
                let options = GluOptions { gate_bias, up_bias, ..options(activation, dispatch) };
                glu(&arrays[0], &arrays[1], options)
            },
        );
    }
}

#[test]
fn an_array_may_gate_itself() {
    let x = normal(1, &[64], Dtype::Float32);
    matches_the_oracle(Activation::Silu, "itself", &x, &x);
}

#[test]
fn gradients_match_finite_differences() {
    let inputs = [1, 2].map(|seed| Tensor::of(&normal(seed, &[2, 3, 5], Dtype::Float32)));
    for &activation in Activation::ALL {
        gradients_on_each_backend(
            OP,
            &inputs,
            |inputs| oracle(activation, &inputs[0], &inputs[1]),
            |arrays, dispatch| glu(&arrays[0], &arrays[1], options(activation, dispatch)),
        );
    }
}

#[test]
fn each_variant_has_its_activation() {
    type Variant = fn(&Array, &Array) -> Result<Array>;
    let variants: [Variant; 4] =
        [|g, u| swiglu(g, u), |g, u| geglu(g, u), |g, u| geglu_tanh(g, u), |g, u| reglu(g, u)];
    let [gate, up] = [1, 2].map(|seed| normal(seed, &[512], Dtype::Float32));
    for (activation, variant) in VARIANTS.into_iter().zip(variants) {
        let expected = oracle(activation, &Tensor::of(&gate), &Tensor::of(&up));
        let y = variant(&gate, &up).unwrap();
        let what = format!("variant {activation}");
        assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn it_compiles() {
    let gated =
        |(gate, up): (&Array, &Array)| -> Result<Array, Exception> { Ok(swiglu(gate, up)?) };
    let [gate, up] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float32));
    let compiled = compile(gated, None)((&gate, &up)).unwrap();
    let expected = oracle(Activation::Silu, &Tensor::of(&gate), &Tensor::of(&up));
    assert_close("compiled glu", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |gate: &Array, up: &Array| swiglu(gate, up).unwrap_err().to_string();
    assert_eq!(
        call(&x, &normal(1, &[8], Dtype::Float32)),
        "[glu] up must have shape [2, 8] but got [8]"
    );
    assert_eq!(
        call(&x, &normal(1, &[2, 8], Dtype::Float16)),
        "[glu] up must have dtype Float32 but got Float16"
    );
    assert!(call(&ints, &ints).starts_with("[glu] gate must have dtype Float32"));
    let biased = |gate: &Array, bias: &Array| {
        let options = GluOptions { up_bias: Some(bias), ..Default::default() };
        glu(gate, gate, options).unwrap_err().to_string()
    };
    assert_eq!(
        biased(&x, &normal(1, &[9], Dtype::Float32)),
        "[glu] up_bias must have shape [8] but got [9]"
    );
    assert!(biased(&x, &ints).starts_with("[glu] up_bias must have dtype Float32"));
    assert_eq!(
        biased(&Array::from_f32(1.0), &x),
        "[glu] gate must have shape [..., D] with D at least 1 but got []"
    );
}

#[test]
fn the_module_splits_gate_first() {
    let x = normal(5, &[2, 3, 8], Dtype::Float32);
    let tensor = Tensor::of(&x);
    let half = |offset| Tensor::from_fn(&[2, 3, 4], |i| tensor.at(&[i[0], i[1], i[2] + offset]));
    let expected = oracle(Activation::Gelu, &half(0), &half(4));
    let mut module = Glu::new(Activation::Gelu);
    assert_eq!(module.parameters().flatten().len(), 0);
    let y = module.forward(&x).unwrap();
    assert_close("Glu", &y, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn the_module_refuses_what_has_no_halves() {
    let refusal = |shape: &[i32]| {
        let x = normal(5, shape, Dtype::Float32);
        Glu::new(Activation::Silu).forward(&x).unwrap_err().what().to_owned()
    };
    assert_eq!(refusal(&[2, 7]), "[Glu] x must have an even last axis but got 7");
    assert!(refusal(&[2, 0]).starts_with("[Glu] x must have shape [..., D] with D at least 1"));
    assert!(refusal(&[]).starts_with("[Glu] x must have shape [..., D] with D at least 1"));
}

#[test]
fn the_module_takes_no_rows() {
    let x = normal(5, &[0, 8], Dtype::Float32);
    assert_eq!(Glu::new(Activation::Silu).forward(&x).unwrap().shape(), [0, 4]);
}
