use mlx_primitives::{
    Backend, Dispatch, Error, Result,
    norm::{GateOrder, GatedRmsNorm, GatedRmsNormBuilder, GatedRmsNormOptions, gated_rms_norm},
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

const OP: &str = "gated_rms_norm";
/// Far from the default, so that an implementation which ignores it is found out.
const EPS: f32 = 1e-2;
const ORDERS: [GateOrder; 2] = [GateOrder::GateThenNorm, GateOrder::NormThenGate];

struct Case {
    name: &'static str,
    shape: &'static [i32],
    group_size: Option<i32>,
    strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32]) -> Case {
    Case { name, shape, group_size: None, strided: false }
}

const CASES: &[Case] = &[
    case("one element", &[1]),
    case("one row", &[7]),
    case("rows of one", &[5, 1]),
    case("no rows", &[0, 8]),
    case("rank 2", &[3, 8]),
    case("rank 3", &[2, 3, 9]),
    case("64", &[4, 64]),
    case("65", &[40, 65]),
    case("1000", &[2, 1000]),
    case("1025", &[2, 1025]),
    case("4095", &[1, 4095]),
    case("4097", &[1, 4097]),
    Case { group_size: Some(1), ..case("groups of one", &[2, 5]) },
    Case { group_size: Some(3), ..case("groups of three", &[2, 5, 9]) },
    Case { group_size: Some(65), ..case("one group", &[40, 65]) },
    Case { group_size: Some(64), ..case("no rows of groups", &[0, 128]) },
    Case { group_size: Some(1000), ..case("long groups", &[2, 3000]) },
    Case { strided: true, group_size: Some(13), ..case("strided", &[3, 4, 65]) },
];

fn silu(z: f64) -> f64 {
    z / (1.0 + (-z).exp())
}

fn oracle(
    x: &Tensor,
    gate: &Tensor,
    weight: &Tensor,
    order: GateOrder,
    group_size: Option<i32>,
) -> Tensor {
    let dims = weight.values.len();
    let size = group_size.map_or(dims, |size| size as usize);
    let mut values = Vec::new();
    for (g, (xs, gates)) in x.values.chunks(size).zip(gate.values.chunks(size)).enumerate() {
        let weights = &weight.values[g * size % dims..][..size];
        let gated: Vec<_> = match order {
            GateOrder::GateThenNorm => xs.iter().zip(gates).map(|(x, &z)| x * silu(z)).collect(),
            GateOrder::NormThenGate => xs.to_vec(),
        };
        let mean_square = gated.iter().map(|u| u * u).sum::<f64>() / size as f64;
        let scale = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        values.extend((0..size).map(|i| {
            let after = match order {
                GateOrder::GateThenNorm => 1.0,
                GateOrder::NormThenGate => silu(gates[i]),
            };
            gated[i] * scale * weights[i] * after
        }));
    }
    Tensor::new(&x.shape, values)
}

fn options(order: GateOrder, group_size: Option<i32>, dispatch: Dispatch) -> GatedRmsNormOptions {
    GatedRmsNormOptions { eps: EPS, order, group_size, dispatch }
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for (dtype, order) in FLOATING.into_iter().flat_map(|d| ORDERS.map(|order| (d, order))) {
            let arrays = [1, 2].map(|seed| normal(seed, case.shape, dtype));
            let [x, gate] = if case.strided { arrays.map(|array| strided(&array)) } else { arrays };
            let weight = normal(3, &case.shape[case.shape.len() - 1..], dtype);
            let [x64, gate64, weight64] = [&x, &gate, &weight].map(Tensor::of);
            let expected = oracle(&x64, &gate64, &weight64, order, case.group_size);
            on_each_backend(
                OP,
                |dispatch| {
                    gated_rms_norm(&x, &gate, &weight, options(order, case.group_size, dispatch))
                },
                |backend, y| {
                    assert_eq!(y.dtype(), dtype, "{}", case.name);
                    let what = format!("{OP} {order:?} {} {dtype:?} on {backend}", case.name);
                    assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                },
            );
        }
    }
}

#[test]
fn a_weight_of_another_dtype_keeps_the_dtype_of_x() {
    for (of_x, of_weight) in [(Dtype::Float16, Dtype::Float32), (Dtype::Float32, Dtype::Bfloat16)] {
        let [x, gate] = [1, 2].map(|seed| normal(seed, &[3, 64], of_x));
        let weight = normal(3, &[64], of_weight);
        let [x64, gate64, weight64] = [&x, &gate, &weight].map(Tensor::of);
        let expected = oracle(&x64, &gate64, &weight64, GateOrder::GateThenNorm, Some(16));
        on_each_backend(
            OP,
            |dispatch| {
                let options = options(GateOrder::GateThenNorm, Some(16), dispatch);
                gated_rms_norm(&x, &gate, &weight, options)
            },
            |backend, y| {
                assert_eq!(y.dtype(), of_x);
                let what = format!("{OP} {of_x:?} with {of_weight:?} on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, of_x));
            },
        );
    }
}

/// Gates that overflow an exponential open fully or shut.
#[test]
fn large_half_precision_rows_do_not_overflow() {
    let large = Array::from_f32(1e3).as_dtype(Dtype::Float16).unwrap();
    let [x, gate] =
        [1, 2].map(|seed| normal(seed, &[2, 4096], Dtype::Float16).multiply(&large).unwrap());
    let weight = normal(3, &[4096], Dtype::Float16).multiply(Array::from_f32(1e-2)).unwrap();
    let weight = weight.as_dtype(Dtype::Float16).unwrap();
    let [x64, gate64, weight64] = [&x, &gate, &weight].map(Tensor::of);
    for order in ORDERS {
        let expected = oracle(&x64, &gate64, &weight64, order, None);
        on_each_backend(
            OP,
            |dispatch| gated_rms_norm(&x, &gate, &weight, options(order, None, dispatch)),
            |backend, y| {
                let what = format!("{OP} {order:?} large on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float16));
            },
        );
    }
}

/// With rows enough for every worker to take another turn, several to a simdgroup and several simdgroups to one.
const GRADIENT_CASES: [(&[i32], Option<i32>); 3] =
    [(&[5, 8, 5], None), (&[80, 6], Some(3)), (&[3, 600], Some(300))];

#[test]
fn gradients_match_finite_differences() {
    for (shape, group_size) in GRADIENT_CASES {
        let inputs = [(3, shape), (4, shape), (5, &shape[shape.len() - 1..])]
            .map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)));
        for order in ORDERS {
            gradients_on_each_backend(
                OP,
                &inputs,
                |inputs| oracle(&inputs[0], &inputs[1], &inputs[2], order, group_size),
                |arrays, dispatch| {
                    let options = options(order, group_size, dispatch);
                    gated_rms_norm(&arrays[0], &arrays[1], &arrays[2], options)
                },
            );
        }
    }
}

#[test]
fn it_compiles() {
    let norm = |(x, gate, weight): (&Array, &Array, &Array)| -> Result<Array, Exception> {
        Ok(gated_rms_norm(x, gate, weight, GatedRmsNormOptions::default())?)
    };
    let [x, gate] = [1, 2].map(|seed| normal(seed, &[3, 64], Dtype::Float32));
    let weight = normal(3, &[64], Dtype::Float32);
    let compiled = compile(norm, None)((&x, &gate, &weight)).unwrap();
    let expected = Tensor::of(&norm((&x, &gate, &weight)).unwrap());
    assert_close("compiled", &compiled, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let x = normal(1, &[2, 8], Dtype::Float32);
    let weight = normal(2, &[8], Dtype::Float32);
    let ints = Array::from_slice(&[1_i32; 8], &[8]);
    let call = |x: &Array, gate: &Array, weight: &Array, eps, group_size| {
        let options = GatedRmsNormOptions { eps, group_size, ..Default::default() };
        gated_rms_norm(x, gate, weight, options).unwrap_err().to_string()
    };
    assert_eq!(
        call(&x, &weight, &weight, EPS, None),
        "[gated_rms_norm] gate must have shape [2, 8] but got [8]"
    );
    assert_eq!(
        call(&x, &normal(1, &[2, 8], Dtype::Float16), &weight, EPS, None),
        "[gated_rms_norm] gate must have dtype Float32 but got Float16"
    );
    assert_eq!(
        call(&x, &x, &normal(2, &[9], Dtype::Float32), EPS, None),
        "[gated_rms_norm] weight must have shape [8] but got [9]"
    );
    assert!(call(&ints, &ints, &weight, EPS, None).starts_with("[gated_rms_norm] x must have dty"));
    assert!(call(&x, &x, &ints, EPS, None).starts_with("[gated_rms_norm] weight must have dtype"));
    for shape in [&[][..], &[3, 0]] {
        let x = normal(1, shape, Dtype::Float32);
        let expected = "[gated_rms_norm] x must have shape [..., D] with D at least 1 but got";
        assert!(call(&x, &x, &weight, EPS, None).starts_with(expected));
    }
    for size in [0, -8, 3, 16] {
        assert_eq!(
            call(&x, &x, &weight, EPS, Some(size)),
            format!("[gated_rms_norm] group_size must divide 8 but got {size}")
        );
    }
    assert_eq!(
        call(&x, &x, &weight, f32::NAN, None),
        "[gated_rms_norm] eps must be finite and at least 0 but got NaN"
    );
}

#[test]
fn the_kernel_refuses_more_groups_than_a_grid_has() {
    let x = normal(1, &[1, 65536], Dtype::Float32);
    let forced = options(GateOrder::GateThenNorm, Some(1), Dispatch::Only(Backend::Kernel));
    let refused = gated_rms_norm(&x, &x, x.reshape(&[-1]).unwrap(), forced);
    assert!(matches!(refused, Err(Error::Unavailable { op: OP, .. })), "{refused:?}");
    let auto = options(GateOrder::GateThenNorm, Some(1), Dispatch::Auto);
    assert!(gated_rms_norm(&x, &x, x.reshape(&[-1]).unwrap(), auto).is_ok());
}

#[test]
fn the_module_trains_saves_and_composes() {
    let module = GatedRmsNormBuilder::new(8).eps(EPS).group_size(4).build().unwrap();
    assert_module(module, &normal(5, &[2, 3, 8], Dtype::Float32), &["weight"]);
}

#[test]
fn the_module_is_the_function() {
    let [x, gate] = [5, 6].map(|seed| normal(seed, &[2, 8], Dtype::Float32));
    let weight = normal(7, &[8], Dtype::Float32);
    let (order, group_size) = (GateOrder::NormThenGate, Some(4));
    let builder = GatedRmsNormBuilder::new(8).eps(EPS).order(order).group_size(group_size);
    let mut module = builder.build().unwrap();
    module.weight.value = weight.clone();
    let y = module.forward((&x, &gate)).unwrap();
    let [x, gate, weight] = [&x, &gate, &weight].map(Tensor::of);
    let expected = oracle(&x, &gate, &weight, order, group_size);
    assert_close("GatedRmsNorm", &y, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    assert!(matches!(GatedRmsNorm::new(0), Err(Error::Value { argument: "dims", .. })));
    let builder = GatedRmsNormBuilder::new(8).eps(f32::INFINITY);
    assert!(matches!(builder.build(), Err(Error::Value { argument: "eps", .. })));
    let builder = GatedRmsNormBuilder::new(8).group_size(3);
    assert!(matches!(builder.build(), Err(Error::Value { argument: "group_size", .. })));
}
