use mlx_primitives::{
    Backend, Dispatch, Error, Result,
    norm::{RmsNormLinear, RmsNormLinearBuilder, RmsNormLinearOptions, rms_norm_linear},
};
use mlx_rs::{
    Array, Dtype, builder::Builder, error::Exception, module::Module, transforms::compile::compile,
};

use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    modules::assert_module,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "rms_norm_linear";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

struct Case {
    name: &'static str,
    shape: &'static [i32],
    outputs: i32,
    biased: bool,
    unit_offset: bool,
    strided: bool,
    zero: bool,
}

const fn case(name: &'static str, shape: &'static [i32], outputs: i32) -> Case {
    Case { name, shape, outputs, biased: false, unit_offset: false, strided: false, zero: false }
}

const CASES: &[Case] = &[
    case("one element", &[1], 1),
    case("one element, outputs", &[1], 9),
    case("one row of rank 1", &[7], 3),
    case("one row of rank 2", &[1, 8], 5),
    case("one row of rank 3", &[1, 1, 9], 2),
    case("63", &[1, 63], 7),
    case("64", &[1, 64], 8),
    case("65", &[1, 65], 9),
    case("one output", &[1, 1000], 1),
    case("1000", &[1, 1000], 33),
    case("1023", &[1, 1023], 4),
    case("1024", &[1, 1024], 4),
    case("1025", &[1, 1025], 4),
    case("4095", &[1, 4095], 3),
    case("4096", &[1, 4096], 3),
    case("4097", &[1, 4097], 3),
    Case { biased: true, ..case("bias", &[1, 72], 11) },
    Case { biased: true, ..case("bias of one", &[1, 9], 1) },
    Case { unit_offset: true, ..case("offset", &[1, 72], 11) },
    Case { strided: true, ..case("strided", &[1, 1, 72], 5) },
    Case { zero: true, biased: true, ..case("a row of zeros", &[1, 9], 5) },
    case("no rows", &[0, 8], 3),
    case("no outputs", &[1, 8], 0),
    case("rows", &[3, 8], 5),
    Case { biased: true, ..case("rows of rank 3", &[2, 3, 65], 9) },
    Case { biased: true, unit_offset: true, strided: true, ..case("all", &[4, 2, 40], 7) },
];

fn oracle(
    x: &Tensor,
    norm_weight: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    unit_offset: bool,
) -> Tensor {
    let offset = if unit_offset { 1.0 } else { 0.0 };
    let products = x.rows().flat_map(|row| {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        let factors = norm_weight.values.iter().map(|w| w + offset);
        let normed: Vec<_> = row.iter().zip(factors).map(|(v, w)| v * scale * w).collect();
        (0..weight.shape[0]).map(move |o| {
            let terms = (0..normed.len()).map(|i| normed[i] * weight.at(&[o, i]));
            terms.sum::<f64>() + bias.map_or(0.0, |bias| bias.values[o])
        })
    });
    let (_, leading) = x.shape.split_last().unwrap();
    Tensor::new(&[leading, &weight.shape[..1]].concat(), products.collect())
}

fn options(dispatch: Dispatch) -> RmsNormLinearOptions<'static> {
    RmsNormLinearOptions { eps: EPS, dispatch, ..Default::default() }
}

/// A layer's weight as it is initialized, so that results are of the size of `x`.
fn layer_weight(outputs: i32, inputs: i32, dtype: Dtype) -> Array {
    let scale = Array::from_f32(1.0 / (inputs as f32).sqrt());
    let weight = normal(3, &[outputs, inputs], Dtype::Float32).multiply(scale).unwrap();
    weight.as_dtype(dtype).unwrap()
}

fn check(case: &Case, dtype: Dtype) {
    let inputs = *case.shape.last().unwrap();
    let view = |array: Array| if case.strided { strided(&array) } else { array };
    let x = view(normal(1, case.shape, dtype));
    let x = if case.zero { x.subtract(&x).unwrap() } else { x };
    let norm_weight = view(normal(2, &[inputs], dtype));
    let weight = view(layer_weight(case.outputs, inputs, dtype));
    let bias = case.biased.then(|| normal(4, &[case.outputs], dtype));
    let [x_values, norm_values, weight_values] = [&x, &norm_weight, &weight].map(Tensor::of);
    let bias_values = bias.as_ref().map(Tensor::of);
    let expected =
        oracle(&x_values, &norm_values, &weight_values, bias_values.as_ref(), case.unit_offset);
    on_each_backend(
        OP,
        |dispatch| {
            let (unit_offset, bias) = (case.unit_offset, bias.as_ref());
            let options = RmsNormLinearOptions { unit_offset, bias, ..options(dispatch) };
            rms_norm_linear(&x, &norm_weight, &weight, options)
        },
        |backend, y| {
            assert_eq!(y.dtype(), dtype, "{}", case.name);
            let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
            assert_close(&what, &y, &expected, Tolerance::on(OP, backend, dtype));
        },
    );
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for dtype in FLOATING {
            check(case, dtype);
        }
    }
}

/// The kernel gives a simdgroup two outputs, or four, where there are as many as this; and not all of them here to its
/// last one. Each for one dtype, as so many take the CPU a while.
#[test]
fn every_backend_has_many_outputs() {
    check(&case("pairs of outputs", &[1, 40], 4099), Dtype::Float32);
    check(&case("fours of outputs", &[1, 40], 8193), Dtype::Bfloat16);
}

#[test]
fn weights_of_other_dtypes_keep_the_dtype_of_x() {
    for (of_x, of_norm, of_weight, of_bias) in [
        (Dtype::Float16, Dtype::Float32, Dtype::Float16, Dtype::Float32),
        (Dtype::Bfloat16, Dtype::Float16, Dtype::Bfloat16, Dtype::Float16),
        (Dtype::Float32, Dtype::Bfloat16, Dtype::Float32, Dtype::Bfloat16),
        (Dtype::Float16, Dtype::Float16, Dtype::Float32, Dtype::Float16),
    ] {
        let (x, norm_weight) = (normal(1, &[1, 72], of_x), normal(2, &[72], of_norm));
        let (weight, bias) = (layer_weight(5, 72, of_weight), normal(4, &[5], of_bias));
        let [x_values, norm_values, weight_values, bias_values] =
            [&x, &norm_weight, &weight, &bias].map(Tensor::of);
        let expected = oracle(&x_values, &norm_values, &weight_values, Some(&bias_values), false);
        on_each_backend(
            OP,
            |dispatch| {
                let options = RmsNormLinearOptions { bias: Some(&bias), ..options(dispatch) };
                rms_norm_linear(&x, &norm_weight, &weight, options)
            },
            |backend, y| {
                assert_eq!(y.dtype(), of_x);
                let what = format!("{OP} {of_x:?} with {of_norm:?}, {of_weight:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::on(OP, backend, of_x));
            },
        );
    }
}

#[test]
fn large_half_precision_rows_do_not_overflow() {
    let x = normal(1, &[1, 4096], Dtype::Float16)
        .multiply(Array::from_f32(1e4).as_dtype(Dtype::Float16).unwrap())
        .unwrap();
    let norm_weight = normal(2, &[4096], Dtype::Float16);
    let weight = layer_weight(3, 4096, Dtype::Float16);
    let [x_values, norm_values, weight_values] = [&x, &norm_weight, &weight].map(Tensor::of);
    let expected = oracle(&x_values, &norm_values, &weight_values, None, false);
    on_each_backend(
        OP,
        |dispatch| rms_norm_linear(&x, &norm_weight, &weight, options(dispatch)),
        |backend, y| {
            let tolerance = Tolerance::on(OP, backend, Dtype::Float16);
            assert_close(&format!("{OP} large on {backend}"), &y, &expected, tolerance);
        },
    );
}

#[test]
fn gradients_match_finite_differences() {
    for rows in [&[1, 1, 5][..], &[2, 3, 5]] {
        let shapes = [rows, &[5], &[4, 5], &[4]];
        let inputs: Vec<_> = (3..)
            .zip(shapes)
            .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)))
            .collect();
        for biased in [false, true] {
            gradients_on_each_backend(
                OP,
                if biased { &inputs } else { &inputs[..3] },
                |inputs| oracle(&inputs[0], &inputs[1], &inputs[2], inputs.get(3), false),
                |arrays, dispatch| {
                    let options = RmsNormLinearOptions { bias: arrays.get(3), ..options(dispatch) };
                    rms_norm_linear(&arrays[0], &arrays[1], &arrays[2], options)
                },
            );
        }
    }
}

#[test]
fn it_compiles() {
    let op = |(x, norm_weight, weight): (&Array, &Array, &Array)| -> Result<Array, Exception> {
        Ok(rms_norm_linear(x, norm_weight, weight, RmsNormLinearOptions::default())?)
    };
    let (x, norm_weight) = (normal(1, &[1, 64], Dtype::Float32), normal(2, &[64], Dtype::Float32));
    let weight = layer_weight(5, 64, Dtype::Float32);
    let compiled = compile(op, None)((&x, &norm_weight, &weight)).unwrap();
    let expected = Tensor::of(&op((&x, &norm_weight, &weight)).unwrap());
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("compiled rms_norm_linear", &compiled, &expected, tolerance);
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let [x, norm_weight] = [&[2, 8][..], &[8]].map(|shape| normal(1, shape, Dtype::Float32));
    let weight = layer_weight(3, 8, Dtype::Float32);
    let nine = normal(2, &[9], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 24], &[3, 8]);
    let call = |x: &Array, norm_weight: &Array, weight: &Array, bias: Option<&Array>, eps| {
        let options = RmsNormLinearOptions { eps, bias, ..Default::default() };
        rms_norm_linear(x, norm_weight, weight, options).unwrap_err().to_string()
    };
    assert_eq!(
        call(&Array::from_f32(1.0), &norm_weight, &weight, None, EPS),
        "[rms_norm_linear] x must have shape [..., D] with D at least 1 but got []"
    );
    assert_eq!(
        call(&normal(1, &[3, 0], Dtype::Float32), &norm_weight, &weight, None, EPS),
        "[rms_norm_linear] x must have shape [..., D] with D at least 1 but got [3, 0]"
    );
    assert_eq!(
        call(&x, &nine, &weight, None, EPS),
        "[rms_norm_linear] norm_weight must have shape [8] but got [9]"
    );
    assert_eq!(
        call(&x, &norm_weight, &layer_weight(8, 3, Dtype::Float32), None, EPS),
        "[rms_norm_linear] weight must have shape [O, 8] but got [8, 3]"
    );
    assert_eq!(
        call(&x, &norm_weight, &weight, Some(&nine), EPS),
        "[rms_norm_linear] bias must have shape [3] but got [9]"
    );
    for (refused, argument) in [
        (call(&ints, &norm_weight, &weight, None, EPS), "x"),
        (call(&x, &ints, &weight, None, EPS), "norm_weight"),
        (call(&x, &norm_weight, &ints, None, EPS), "weight"),
        (call(&x, &norm_weight, &weight, Some(&ints), EPS), "bias"),
    ] {
        let expected = format!("[rms_norm_linear] {argument} must have dtype Float32");
        assert!(refused.starts_with(&expected), "{refused}");
    }
    assert_eq!(
        call(&x, &norm_weight, &weight, None, f32::NAN),
        "[rms_norm_linear] eps must be finite and at least 0 but got NaN"
    );
}

#[test]
fn the_kernel_says_what_it_cannot_take() {
    let norm_weight = normal(2, &[8], Dtype::Float32);
    let refusal = |shape: &[i32], weight: &Array| {
        let x = normal(1, shape, Dtype::Float32);
        let options = options(Dispatch::Only(Backend::Kernel));
        match rms_norm_linear(&x, &norm_weight, weight, options) {
            Err(Error::Unavailable { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let weight = layer_weight(3, 8, Dtype::Float32);
    assert_eq!(refusal(&[2, 8], &weight), "the kernel takes one row");
    assert_eq!(refusal(&[0, 8], &weight), "a kernel takes no empty array");
    let half = layer_weight(3, 8, Dtype::Float16);
    assert_eq!(refusal(&[1, 8], &half), "the kernel takes a weight of the dtype of x");
}

#[test]
fn the_module_trains_saves_and_composes() {
    let x = normal(5, &[2, 3, 8], Dtype::Float32);
    let module = |bias| RmsNormLinearBuilder::new(8, 5).eps(EPS).bias(bias).build().unwrap();
    assert_module(module(false), &x, &["norm.weight", "linear.weight"]);
    assert_module(module(true), &x, &["norm.weight", "linear.weight", "linear.bias"]);
}

#[test]
fn the_module_is_the_function() {
    let x = normal(5, &[2, 8], Dtype::Float32);
    let (norm_weight, weight) =
        (normal(6, &[8], Dtype::Float32), layer_weight(3, 8, Dtype::Float32));
    let bias = normal(7, &[3], Dtype::Float32);
    let [x_values, norm_values, weight_values, bias_values] =
        [&x, &norm_weight, &weight, &bias].map(Tensor::of);
    for unit_offset in [false, true] {
        let builder = RmsNormLinearBuilder::new(8, 3).eps(EPS).unit_offset(unit_offset).bias(true);
        let mut module = builder.build().unwrap();
        module.norm.weight.value = norm_weight.clone();
        module.linear.weight.value = weight.clone();
        module.linear.bias.value = Some(bias.clone());
        let y = module.forward(&x).unwrap();
        let expected =
            oracle(&x_values, &norm_values, &weight_values, Some(&bias_values), unit_offset);
        assert_close("RmsNormLinear", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let argument = |error| match error {
        Error::Value { op: "RmsNormLinear", argument, .. } => argument,
        other => panic!("{other}"),
    };
    assert_eq!(argument(RmsNormLinear::new(0, 8).unwrap_err()), "input_dims");
    assert_eq!(argument(RmsNormLinear::new(8, 0).unwrap_err()), "output_dims");
    let builder = RmsNormLinearBuilder::new(8, 8).eps(f32::NAN);
    assert_eq!(argument(builder.build().unwrap_err()), "eps");
}
