use mlx_primitives::{
    Backend, Dispatch, Error, Result,
    norm::{LayerNorm, LayerNormBuilder, LayerNormOptions, layer_norm},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::{Module, ModuleParameters},
    transforms::compile::compile,
};

use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    modules::assert_module,
    rows::ROWS,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "layer_norm";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    shape: &'static [i32],
    weighted: bool,
    biased: bool,
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, weighted: true, biased: true, strided: false }
}

/// Every option, beside the shapes that have none.
const OPTIONS: &[Case] = &[
    Case { biased: false, ..case("weight alone", &[3, 65]) },
    Case { weighted: false, ..case("bias alone", &[3, 65]) },
    Case { weighted: false, biased: false, ..case("neither", &[3, 65]) },
];

fn cases() -> impl Iterator<Item = Case> {
    ROWS.iter()
        .map(|rows| Case { strided: rows.strided, ..case(rows.name, rows.shape) })
        .chain(OPTIONS.iter().copied())
}

fn oracle(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Tensor {
    let normed = x.rows().flat_map(|row| {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        row.iter().enumerate().map(move |(i, v)| {
            let scale = weight.map_or(1.0, |w| w.values[i]) / (variance + eps).sqrt();
            (v - mean) * scale + bias.map_or(0.0, |b| b.values[i])
        })
    });
    Tensor::new(&x.shape, normed.collect())
}

fn options(dispatch: Dispatch) -> LayerNormOptions {
    LayerNormOptions { eps: EPS, dispatch }
}

/// The backends differ in where they round.
fn tolerance(backend: Backend, dtype: Dtype) -> Tolerance {
    Tolerance::on(OP, backend, dtype)
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in cases() {
        for dtype in FLOATING {
            let x = normal(1, case.shape, dtype);
            let x = if case.strided { strided(&x) } else { x };
            let dims = *case.shape.last().unwrap();
            let weight = case.weighted.then(|| normal(2, &[dims], dtype));
            let bias = case.biased.then(|| normal(3, &[dims], dtype));
            let expected = oracle(
                &Tensor::of(&x),
                weight.as_ref().map(Tensor::of).as_ref(),
                bias.as_ref().map(Tensor::of).as_ref(),
                EPS.into(),
            );
            on_each_backend(
                OP,
                |dispatch| layer_norm(&x, &weight, &bias, options(dispatch)),
                |backend, y| {
                    assert_eq!(y.dtype(), dtype, "{}", case.name);
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&what, &y, &expected, tolerance(backend, dtype));
                },
            );
        }
    }
}

#[test]
fn parameters_of_another_dtype_keep_the_dtype_of_x() {
    let x = normal(1, &[3, 64], Dtype::Float16);
    let (weight, bias) = (normal(2, &[64], Dtype::Float32), normal(3, &[64], Dtype::Bfloat16));
    let tensors = [&x, &weight, &bias].map(Tensor::of);
    let expected = oracle(&tensors[0], Some(&tensors[1]), Some(&tensors[2]), EPS.into());
    on_each_backend(
        OP,
        |dispatch| layer_norm(&x, &weight, &bias, options(dispatch)),
        |backend, y| {
            assert_eq!(y.dtype(), Dtype::Float16);
            let what = format!("{OP} mixed on {backend}");
            assert_close(&what, &y, &expected, tolerance(backend, Dtype::Float16));
        },
    );
}

/// Eighths around 4096 have an exact f32 sum, so only `mean(x²) - mean(x)²` would go wrong: there
/// the squares have lost every bit of the variance.
#[test]
fn a_large_mean_does_not_cancel() {
    let mut x = Tensor::of(&normal(1, &[4, 64], Dtype::Float32));
    x.values.iter_mut().for_each(|value| *value = 4096.0 + (*value * 8.0).round() / 8.0);
    let expected = oracle(&x, None, None, EPS.into());
    let x = x.to_array(Dtype::Float32);
    on_each_backend(
        OP,
        |dispatch| layer_norm(&x, None, None, options(dispatch)),
        |backend, y| {
            let what = format!("{OP} large mean on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
        },
    );
}

#[test]
fn large_half_precision_rows_do_not_overflow() {
    let x = normal(1, &[2, 4096], Dtype::Float16)
        .multiply(Array::from_f32(1e4).as_dtype(Dtype::Float16).unwrap())
        .unwrap();
    let expected = oracle(&Tensor::of(&x), None, None, EPS.into());
    on_each_backend(
        OP,
        |dispatch| layer_norm(&x, None, None, options(dispatch)),
        |backend, y| {
            let what = format!("{OP} large on {backend}");
            assert_close(&what, &y, &expected, tolerance(backend, Dtype::Float16));
        },
    );
}

/// With rows enough for every worker of a kernel to take another turn.
#[test]
fn gradients_match_finite_differences() {
    let inputs = [(3, &[5, 8, 5][..]), (4, &[5]), (5, &[5])]
        .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)));
    gradients_on_each_backend(
        OP,
        &inputs,
        |inputs| oracle(&inputs[0], Some(&inputs[1]), Some(&inputs[2]), EPS.into()),
        |arrays, dispatch| layer_norm(&arrays[0], &arrays[1], &arrays[2], options(dispatch)),
    );
    gradients_on_each_backend(
        OP,
        &inputs[..2],
        |inputs| oracle(&inputs[0], Some(&inputs[1]), None, EPS.into()),
        |arrays, dispatch| layer_norm(&arrays[0], &arrays[1], None, options(dispatch)),
    );
    gradients_on_each_backend(
        OP,
        &inputs[..2],
        |inputs| oracle(&inputs[0], None, Some(&inputs[1]), EPS.into()),
        |arrays, dispatch| layer_norm(&arrays[0], None, &arrays[1], options(dispatch)),
    );
    gradients_on_each_backend(
        OP,
        &[Tensor::of(&normal(3, &[3, 300], Dtype::Float32))],
        |inputs| oracle(&inputs[0], None, None, EPS.into()),
        |arrays, dispatch| layer_norm(&arrays[0], None, None, options(dispatch)),
    );
}

#[test]
fn it_compiles() {
    let norm = |(x, weight, bias): (&Array, &Array, &Array)| -> Result<Array, Exception> {
        Ok(layer_norm(x, weight, bias, LayerNormOptions::default())?)
    };
    let x = normal(1, &[3, 64], Dtype::Float32);
    let (weight, bias) = (normal(2, &[64], Dtype::Float32), normal(3, &[64], Dtype::Float32));
    let compiled = compile(norm, None)((&x, &weight, &bias)).unwrap();
    let expected = Tensor::of(&norm((&x, &weight, &bias)).unwrap());
    assert_close("compiled layer_norm", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let nine = normal(2, &[9], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |x: &Array, weight: Option<&Array>, bias: Option<&Array>, eps| {
        let options = LayerNormOptions { eps, ..Default::default() };
        layer_norm(x, weight, bias, options).unwrap_err().to_string()
    };
    assert_eq!(
        call(&x, Some(&nine), None, EPS),
        "[layer_norm] weight must have shape [8] but got [9]"
    );
    assert_eq!(
        call(&x, None, Some(&nine), EPS),
        "[layer_norm] bias must have shape [8] but got [9]"
    );
    assert_eq!(
        call(&Array::from_f32(1.0), None, None, EPS),
        "[layer_norm] x must have shape [..., D] with D at least 1 but got []"
    );
    assert_eq!(
        call(&normal(1, &[3, 0], Dtype::Float32), None, None, EPS),
        "[layer_norm] x must have shape [..., D] with D at least 1 but got [3, 0]"
    );
    assert!(call(&ints, None, None, EPS).starts_with("[layer_norm] x must have dtype Float32"));
    assert!(call(&x, Some(&ints), None, EPS).starts_with("[layer_norm] weight must have dtype"));
    assert!(call(&x, None, Some(&ints), EPS).starts_with("[layer_norm] bias must have dtype"));
    assert_eq!(
        call(&x, None, None, -1.0),
        "[layer_norm] eps must be finite and at least 0 but got -1"
    );
}

#[test]
fn the_module_trains_saves_and_composes() {
    let x = normal(5, &[2, 3, 8], Dtype::Float32);
    let module = |builder: LayerNormBuilder| builder.eps(1e-6).build().unwrap();
    assert_module(module(LayerNormBuilder::new(8)), &x, &["weight", "bias"]);
    assert_module(module(LayerNormBuilder::new(8).bias(false)), &x, &["weight"]);
}

#[test]
fn without_affine_there_is_nothing_to_train() {
    let mut module = LayerNormBuilder::new(8).affine(false).build().unwrap();
    assert_eq!(module.parameters().flatten().len(), 0);
    let x = normal(5, &[2, 8], Dtype::Float32);
    let expected = oracle(&Tensor::of(&x), None, None, LayerNorm::DEFAULT_EPS.into());
    let y = module.forward(&x).unwrap();
    assert_close("plain LayerNorm", &y, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn the_module_is_the_function() {
    let x = normal(5, &[2, 8], Dtype::Float32);
    let (weight, bias) = (normal(6, &[8], Dtype::Float32), normal(7, &[8], Dtype::Float32));
    for (mut module, eps) in [
        (LayerNormBuilder::new(8).eps(EPS).build().unwrap(), EPS),
        (LayerNorm::new(8).unwrap(), LayerNorm::DEFAULT_EPS),
    ] {
        (module.weight.value, module.bias.value) = (Some(weight.clone()), Some(bias.clone()));
        let y = module.forward(&x).unwrap();
        let (weight, bias) = (Tensor::of(&weight), Tensor::of(&bias));
        let expected = oracle(&Tensor::of(&x), Some(&weight), Some(&bias), eps.into());
        assert_close("LayerNorm", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    assert!(matches!(LayerNorm::new(0), Err(Error::Value { argument: "dims", .. })));
    let builder = LayerNormBuilder::new(8).eps(f32::NAN);
    assert!(matches!(builder.build(), Err(Error::Value { argument: "eps", .. })));
}
