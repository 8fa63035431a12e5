use mlx_primitives::ssm::{H3, H3Builder, H3State};
use mlx_rs::{
    Dtype,
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

const PARAMETERS: &[&str] = &[
    "diagonal.A_imag",
    "diagonal.C",
    "diagonal.D",
    "diagonal.log_A_real",
    "diagonal.log_dt",
    "k_proj.weight",
    "out_proj.weight",
    "q_proj.weight",
    "shift.weight",
    "v_proj.weight",
];

fn layer(head_dim: i32) -> H3 {
    mlx_rs::random::seed(6).unwrap();
    H3Builder::new(6).d_state(4).d_shift(3).head_dim(head_dim).build().unwrap()
}

fn projected(layer: &H3, name: &str, x: &Tensor) -> Tensor {
    let weight = Tensor::of(layer.parameters().flatten()[name]);
    let rows = x.rows().flat_map(|row| {
        let of = |weights: &[f64]| weights.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
        weight.rows().map(of).collect::<Vec<_>>()
    });
    Tensor::new(&x.shape, rows.collect())
}

fn oracle(layer: &H3, x: &Tensor, size: usize) -> Tensor {
    let [batch, length, dims] = x.shape[..] else { panic!("x is [B, L, dims]") };
    let [q, k, v] =
        ["q_proj.weight", "k_proj.weight", "v_proj.weight"].map(|name| projected(layer, name, x));
    let taps = Tensor::of(&layer.shift.weight);
    let width = taps.shape[2];
    let shifted = Tensor::from_fn(&x.shape, |at| {
        let (b, t, d) = (at[0], at[1], at[2]);
        (0..width.min(t + 1))
            .map(|ago| taps.at(&[d, 0, width - 1 - ago]) * k.at(&[b, t - ago, d]))
            .sum()
    });
    let mut read = Tensor::new(&x.shape, vec![0.0; x.values.len()]);
    for i in 0..size {
        for j in 0..size {
            // One sequence of each head.
            let met = Tensor::from_fn(&[batch, length, dims / size], |at| {
                let first = at[2] * size;
                shifted.at(&[at[0], at[1], first + i]) * v.at(&[at[0], at[1], first + j])
            });
            let kept = diagonal_oracle(&layer.diagonal, &met);
            for (at, value) in read.values.iter_mut().enumerate() {
                let (row, d) = (at / dims, at % dims);
                if d % size == j {
                    let q = q.values[row * dims + d / size * size + i];
                    *value += q * kept.values[row * (dims / size) + d / size];
                }
            }
        }
    }
    projected(layer, "out_proj.weight", &read)
}

#[test]
fn it_matches_the_oracle() {
    for head_dim in [1, 3] {
        let mut layer = layer(head_dim);
        let x = normal(1, &[2, 20, 6], Dtype::Float32);
        let expected = oracle(&layer, &Tensor::of(&x), head_dim as usize);
        let y = layer.forward(&x).unwrap();
        assert_close(&format!("H3, heads of {head_dim}"), &y, &expected, Tolerance::LAYER);
    }
}

#[test]
fn it_goes_on_step_by_step() {
    for head_dim in [1, 2] {
        let mut layer = layer(head_dim);
        let x = normal(2, &[2, 12, 6], Dtype::Float32);
        let whole = layer.forward(&x).unwrap();
        let state = std::cell::RefCell::new(H3State::default());
        let mut stepping = layer.clone();
        assert_steps_follow_prompts(
            "H3",
            &x,
            &whole,
            |x| layer.forward((x, &mut *state.borrow_mut())).unwrap(),
            |x| stepping.step(x, &mut state.borrow_mut()).unwrap(),
        );
        assert_eq!(state.borrow().keys().unwrap().shape(), [2, 2, 6]);
        let mut fresh = H3State::default();
        let first = layer.step(x.index((.., 0)), &mut fresh).unwrap();
        assert_close("first", &first, &Tensor::of(&whole.index((.., 0))), Tolerance::LAYER);
        fresh.reset();
        assert!(fresh.diagonal().is_none());
    }
}

#[test]
fn it_trains() {
    assert_module(layer(2), &normal(3, &[2, 9, 6], Dtype::Float32), PARAMETERS);
}

#[test]
fn bad_input_is_an_error() {
    for builder in [
        H3Builder::new(0),
        H3Builder::new(6).head_dim(4),
        H3Builder::new(6).head_dim(0),
        H3Builder::new(6).d_state(5),
        H3Builder::new(6).d_shift(0),
    ] {
        assert!(builder.clone().build().is_err(), "{builder:?}");
    }
    let mut layer = layer(2);
    let mut state = H3State::default();
    layer.step(normal(1, &[2, 6], Dtype::Float32), &mut state).unwrap();
    let error = layer.step(normal(1, &[3, 6], Dtype::Float32), &mut state).unwrap_err();
    assert!(
        error.to_string().starts_with("[H3] state.real must have shape [3, 3, 4, 2]"),
        "{error}"
    );
    let error = layer.forward(&normal(1, &[2, 6], Dtype::Float32)).unwrap_err();
    assert!(error.what().starts_with("[H3] x must have shape [B, L, 6]"), "{error}");
}
