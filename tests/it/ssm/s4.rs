use mlx_primitives::ssm::{DiagonalSsm, S4, S4Builder};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::{Module, ModuleParameters},
    ops::indexing::IndexOp,
};

use super::{assert_steps_follow_prompts, diagonal_oracle};
use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

const SSM: &[&str] = &["A_imag", "C", "D", "log_A_real", "log_dt"];

fn layer(bidirectional: bool) -> S4 {
    mlx_rs::random::seed(5).unwrap();
    S4Builder::new(6).d_state(8).bidirectional(bidirectional).build().unwrap()
}

fn gelu(x: f64) -> f64 {
    // erf by its series, which is exact enough for the sizes that occur here.
    let z = x / std::f64::consts::SQRT_2;
    let mut term = z;
    let mut sum = z;
    for n in 1..200 {
        term *= -z * z / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    0.5 * x * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
}

/// What the layer makes of the outputs of its systems, `[B, L, dims]`.
fn mixed(layer: &S4, y: &Tensor) -> Tensor {
    let parameters = layer.parameters().flatten();
    let (weight, bias) =
        (Tensor::of(parameters["output.weight"]), Tensor::of(parameters["output.bias"]));
    let dims = y.shape[2];
    let rows = y.rows().flat_map(|row| {
        let row: Vec<_> = row.iter().map(|&y| gelu(y)).collect();
        let of =
            |o: usize| (0..dims).map(|i| weight.at(&[o, i]) * row[i]).sum::<f64>() + bias.at(&[o]);
        (0..dims).map(|o| of(o) / (1.0 + (-of(dims + o)).exp())).collect::<Vec<_>>()
    });
    Tensor::new(&y.shape, rows.collect())
}

fn backwards(y: &Tensor) -> Tensor {
    let length = y.shape[1];
    Tensor::from_fn(&y.shape, |at| y.at(&[at[0], length - 1 - at[1], at[2]]))
}

#[test]
fn the_convolution_matches_the_recurrence_in_f64() {
    for bidirectional in [false, true] {
        let mut layer = layer(bidirectional);
        let x = normal(1, &[2, 43, 6], Dtype::Float32);
        let tensor = Tensor::of(&x);
        let mut y = diagonal_oracle(&layer.ssm, &tensor);
        if let Some(ssm) = &layer.reverse_ssm {
            let from_end = backwards(&diagonal_oracle(ssm, &backwards(&tensor)));
            y.values.iter_mut().zip(&from_end.values).for_each(|(y, other)| *y += other);
        }
        let expected = mixed(&layer, &y);
        let what = format!("S4, bidirectional {bidirectional}");
        assert_close(&what, &layer.forward(&x).unwrap(), &expected, Tolerance::LAYER);
    }
}

/// Phases of fast modes and decays of slow ones add up over thousands of steps.
#[test]
fn a_long_convolution_matches_the_recurrence_in_f64() {
    mlx_rs::random::seed(8).unwrap();
    let mut layer = S4::new(2).unwrap();
    let x = normal(1, &[1, 3000, 2], Dtype::Float32);
    let expected = mixed(&layer, &diagonal_oracle(&layer.ssm, &Tensor::of(&x)));
    assert_close("long S4", &layer.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

#[test]
fn a_layer_goes_on_step_by_step() {
    let mut layer = layer(false);
    let x = normal(2, &[2, 30, 6], Dtype::Float32);
    let whole = layer.forward(&x).unwrap();
    let state = std::cell::RefCell::new(None);
    let mut stepping = layer.clone();
    assert_steps_follow_prompts(
        "S4",
        &x,
        &whole,
        |x| {
            let (first, second) = (x.index((.., ..7)), x.index((.., 7..)));
            let parts =
                [first, second].map(|x| layer.forward((&x, &mut *state.borrow_mut())).unwrap());
            mlx_rs::ops::concatenate(&parts, 1).unwrap()
        },
        |x| stepping.step(x, &mut state.borrow_mut()).unwrap(),
    );
    let mut fresh = None;
    let first = layer.step(x.index((.., 0)), &mut fresh).unwrap();
    assert_close("first", &first, &Tensor::of(&whole.index((.., 0))), Tolerance::LAYER);
}

#[test]
fn a_layer_trains() {
    let x = normal(3, &[2, 9, 6], Dtype::Float32);
    let own = |ssm: &str| SSM.iter().map(move |name| format!("{ssm}.{name}")).collect::<Vec<_>>();
    let outer = ["output.weight", "output.bias"].map(str::to_owned);
    for bidirectional in [false, true] {
        let reverse = if bidirectional { own("reverse_ssm") } else { Vec::new() };
        let names = [own("ssm"), reverse, outer.to_vec()].concat();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        assert_module(layer(bidirectional), &x, &names);
    }
}

/// The frequencies of HiPPO-LegS as the literature has them: half of the eigenvalues of the matrix minus its part of rank
/// one, here by its characteristic polynomial for four states.
#[test]
fn it_starts_with_the_eigenvalues_of_hippo() {
    let layer = S4Builder::new(2).d_state(4).build().unwrap();
    let frequencies = Tensor::of(&layer.ssm.A_imag);
    // The skew matrix S with S_nk = √((2n+1)(2k+1)) / 2 above the diagonal has λ⁴ + p λ² + q, p the sum of its squares above
    // the diagonal and q the square of its Pfaffian.
    let s = |n: f64, k: f64| ((2.0 * n + 1.0) * (2.0 * k + 1.0)).sqrt() / 2.0;
    let pairs = [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (1.0, 2.0), (1.0, 3.0), (2.0, 3.0)];
    let p: f64 = pairs.iter().map(|&(n, k)| s(n, k).powi(2)).sum();
    let pfaffian =
        s(0.0, 1.0) * s(2.0, 3.0) - s(0.0, 2.0) * s(1.0, 3.0) + s(0.0, 3.0) * s(1.0, 2.0);
    let root = (p * p / 4.0 - pfaffian * pfaffian).sqrt();
    let expected = [(p / 2.0 - root).sqrt(), (p / 2.0 + root).sqrt()];
    for row in frequencies.rows() {
        for (got, expected) in row.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5 * expected, "{row:?}");
        }
    }
    let rates = Tensor::of(&layer.ssm.log_A_real);
    assert!(rates.values.iter().all(|rate| (rate.exp() - 0.5).abs() < 1e-6));
}

#[test]
fn no_state_grows_whatever_is_learned() {
    let mut layer = layer(false);
    layer.ssm.log_A_real.value = Array::full::<f32>(&[6, 4], Array::from_f32(-8.0)).unwrap();
    let y = layer.forward(&Array::ones::<f32>(&[1, 65536, 6]).unwrap()).unwrap();
    assert!(Tensor::of(&y).values.iter().all(|y| y.is_finite()));
}

#[test]
fn bad_input_is_an_error() {
    for builder in [
        S4Builder::new(0),
        S4Builder::new(4).d_state(3),
        S4Builder::new(4).d_state(0),
        S4Builder::new(4).dt_range((0.0, 1.0)),
        S4Builder::new(4).dt_range((1.0, f32::NAN)),
    ] {
        assert!(builder.clone().build().is_err(), "{builder:?}");
    }
    let mut one_way = layer(false);
    let mut state = None;
    one_way.step(normal(1, &[2, 6], Dtype::Float32), &mut state).unwrap();
    let error = one_way.step(normal(1, &[3, 6], Dtype::Float32), &mut state).unwrap_err();
    let message = "[S4] state.real must have shape [3, 6, 1, 4] but got [2, 6, 1, 4]";
    assert_eq!(error.to_string(), message);
    let error = layer(true).step(normal(1, &[2, 6], Dtype::Float32), &mut None).unwrap_err();
    assert!(error.to_string().starts_with("[S4] state must be absent"), "{error}");
    let error = one_way.forward(&normal(1, &[2, 6], Dtype::Float32)).unwrap_err();
    assert!(error.what().starts_with("[S4] x must have shape [B, L, 6]"), "{error}");
    assert_eq!(DiagonalSsm::DEFAULT_DT_RANGE, (1e-3, 1e-1));
}
