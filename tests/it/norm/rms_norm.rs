use mlx_primitives::{
    Dispatch, Error, Result,
    norm::{RmsNorm, RmsNormBuilder, RmsNormOptions, rms_norm},
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
    rows::ROWS,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "rms_norm";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    shape: &'static [i32],
    weighted: bool,
    strided: bool,
    zero: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, weighted: true, strided: false, zero: false }
}

/// Every option, beside the shapes that have none.
const OPTIONS: &[Case] = &[
    Case { weighted: false, ..case("unweighted", &[3, 65]) },
    Case { zero: true, ..case("rows of zeros", &[2, 9]) },
];

fn cases() -> impl Iterator<Item = Case> {
    ROWS.iter()
        .map(|rows| Case { strided: rows.strided, ..case(rows.name, rows.shape) })
        .chain(OPTIONS.iter().copied())
}

fn oracle(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Tensor {
    let normed = x.rows().flat_map(|row| {
        let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + eps).sqrt();
        row.iter().enumerate().map(move |(i, v)| v * scale * weight.map_or(1.0, |w| w.values[i]))
    });
    Tensor::new(&x.shape, normed.collect())
}

fn options(dispatch: Dispatch) -> RmsNormOptions {
    RmsNormOptions { eps: EPS, dispatch, ..Default::default() }
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in cases() {
        for dtype in FLOATING {
            let x = normal(1, case.shape, dtype);
            let x = if case.strided { strided(&x) } else { x };
            let x = if case.zero { x.subtract(&x).unwrap() } else { x };
            let dims = *case.shape.last().unwrap();
            let weight = case.weighted.then(|| normal(2, &[dims], dtype));
            let expected =
                oracle(&Tensor::of(&x), weight.as_ref().map(Tensor::of).as_ref(), EPS.into());
            on_each_backend(
                OP,
                |dispatch| rms_norm(&x, &weight, options(dispatch)),
                |backend, y| {
                    assert_eq!(y.dtype(), dtype, "{}", case.name);
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                },
            );
        }
    }
}

#[test]
fn a_weight_of_another_dtype_keeps_the_dtype_of_x() {
    for (of_x, of_weight) in [
        (Dtype::Float16, Dtype::Float32),
        (Dtype::Float32, Dtype::Float16),
        (Dtype::Float16, Dtype::Bfloat16),
    ] {
        let (x, weight) = (normal(1, &[3, 64], of_x), normal(2, &[64], of_weight));
        let expected = oracle(&Tensor::of(&x), Some(&Tensor::of(&weight)), EPS.into());
        on_each_backend(
            OP,
            |dispatch| rms_norm(&x, &weight, options(dispatch)),
            |backend, y| {
                assert_eq!(y.dtype(), of_x);
                let what = format!("{OP} {of_x:?} with {of_weight:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, of_x));
            },
        );
    }
}

#[test]
fn a_unit_offset_is_added_to_the_weight() {
    for dtype in FLOATING {
        let (x, weight) = (normal(1, &[3, 65], dtype), normal(2, &[65], dtype));
        let factor = Tensor::of(&weight);
        let factor = Tensor::new(&factor.shape, factor.values.iter().map(|w| 1.0 + w).collect());
        let expected = oracle(&Tensor::of(&x), Some(&factor), EPS.into());
        on_each_backend(
            OP,
            |dispatch| {
                rms_norm(&x, &weight, RmsNormOptions { unit_offset: true, ..options(dispatch) })
            },
            |backend, y| {
                let what = format!("{OP} with 1 + weight, {dtype:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
            },
        );
    }
}

#[test]
fn large_half_precision_rows_do_not_overflow() {
    let x = normal(1, &[2, 4096], Dtype::Float16)
        .multiply(Array::from_f32(1e4).as_dtype(Dtype::Float16).unwrap())
        .unwrap();
    let expected = oracle(&Tensor::of(&x), None, EPS.into());
    on_each_backend(
        OP,
        |dispatch| rms_norm(&x, None, options(dispatch)),
        |backend, y| {
            let what = format!("{OP} large on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float16));
        },
    );
}

/// With rows enough for every worker of a kernel to take another turn.
#[test]
fn gradients_match_finite_differences() {
    let inputs = [normal(3, &[5, 8, 5], Dtype::Float32), normal(4, &[5], Dtype::Float32)];
    gradients_on_each_backend(
        OP,
        &inputs.map(|array| Tensor::of(&array)),
        |inputs| oracle(&inputs[0], Some(&inputs[1]), EPS.into()),
        |arrays, dispatch| rms_norm(&arrays[0], &arrays[1], options(dispatch)),
    );
    gradients_on_each_backend(
        OP,
        &[Tensor::of(&normal(3, &[3, 300], Dtype::Float32))],
        |inputs| oracle(&inputs[0], None, EPS.into()),
        |arrays, dispatch| rms_norm(&arrays[0], None, options(dispatch)),
    );
}

#[test]
fn it_compiles() {
    let norm = |(x, weight): (&Array, &Array)| -> Result<Array, Exception> {
        Ok(rms_norm(x, weight, RmsNormOptions::default())?)
    };
    let (x, weight) = (normal(1, &[3, 64], Dtype::Float32), normal(2, &[64], Dtype::Float32));
    let compiled = compile(norm, None)((&x, &weight)).unwrap();
    let expected = Tensor::of(&norm((&x, &weight)).unwrap());
    assert_close("compiled rms_norm", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |x: &Array, weight: Option<&Array>, eps| {
        rms_norm(x, weight, RmsNormOptions { eps, ..Default::default() }).unwrap_err().to_string()
    };
    assert_eq!(
        call(&x, Some(&normal(2, &[9], Dtype::Float32)), EPS),
        "[rms_norm] weight must have shape [8] but got [9]"
    );
    assert_eq!(
        call(&Array::from_f32(1.0), None, EPS),
        "[rms_norm] x must have shape [..., D] with D at least 1 but got []"
    );
    assert_eq!(
        call(&normal(1, &[3, 0], Dtype::Float32), None, EPS),
        "[rms_norm] x must have shape [..., D] with D at least 1 but got [3, 0]"
    );
    assert!(call(&ints, None, EPS).starts_with("[rms_norm] x must have dtype Float32"));
    assert!(call(&x, Some(&ints), EPS).starts_with("[rms_norm] weight must have dtype Float32"));
    assert_eq!(
        call(&x, None, f32::NAN),
        "[rms_norm] eps must be finite and at least 0 but got NaN"
    );
}

#[test]
fn the_module_trains_saves_and_composes() {
    let module = RmsNormBuilder::new(8).eps(EPS).build().unwrap();
    assert_module(module, &normal(5, &[2, 3, 8], Dtype::Float32), &["weight"]);
}

#[test]
fn the_module_is_the_function() {
    let (x, weight) = (normal(5, &[2, 8], Dtype::Float32), normal(6, &[8], Dtype::Float32));
    for (mut module, eps) in [
        (RmsNormBuilder::new(8).eps(EPS).build().unwrap(), EPS),
        (RmsNorm::new(8).unwrap(), RmsNorm::DEFAULT_EPS),
    ] {
        module.weight.value = weight.clone();
        let y = module.forward(&x).unwrap();
        let expected = oracle(&Tensor::of(&x), Some(&Tensor::of(&weight)), eps.into());
        assert_close("RmsNorm", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn a_module_with_a_unit_offset_starts_as_one_without() {
    let x = normal(5, &[2, 8], Dtype::Float32);
    let mut offset = RmsNormBuilder::new(8).unit_offset(true).build().unwrap();
    let y = RmsNorm::new(8).unwrap().forward(&x).unwrap();
    assert_close("RmsNorm", &offset.forward(&x).unwrap(), &Tensor::of(&y), Tolerance::EXACT);
    offset.weight.value = Array::from_slice(&[1.0_f32; 8], &[8]);
    let doubled = y.multiply(Array::from_f32(2.0)).unwrap();
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("RmsNorm", &offset.forward(&x).unwrap(), &Tensor::of(&doubled), tolerance);
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    assert!(matches!(RmsNorm::new(0), Err(Error::Value { argument: "dims", .. })));
    let builder = RmsNormBuilder::new(8).eps(f32::INFINITY);
    assert!(matches!(builder.build(), Err(Error::Value { argument: "eps", .. })));
}
