use mlx_primitives::ssm::{Mamba, MambaBlock, MambaBlockBuilder, MambaBuilder, MambaState};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::{Module, ModuleParameters},
    ops::indexing::IndexOp,
};

use super::{Weights, assert_steps_follow_prompts, silu, times, weights};
use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

/// As `mamba_ssm` names them.
const PARAMETERS: &[&str] = &[
    "A_log",
    "D",
    "conv1d.bias",
    "conv1d.weight",
    "dt_proj.bias",
    "dt_proj.weight",
    "in_proj.weight",
    "out_proj.weight",
    "x_proj.weight",
];

fn block() -> MambaBlock {
    mlx_rs::random::seed(3).unwrap();
    MambaBlockBuilder::new(6).d_state(3).dt_rank(2).build().unwrap()
}

/// One sequence, step by step, by the equations of the paper.
fn oracle(weights: &Weights, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (decays, conv) = (&weights["A_log"], &weights["conv1d.weight"]);
    let (inner, states) = (decays.shape[0], decays.shape[1]);
    let (rank, width) = (weights["dt_proj.weight"].shape[1], conv.shape[2]);
    let mut held = vec![vec![0.0; states]; inner];
    let mut seen: Vec<Vec<f64>> = vec![vec![0.0; inner]; width - 1];
    let mut outputs = Vec::new();
    for row in rows {
        let both = times(&weights["in_proj.weight"], row);
        seen.push(both[..inner].to_vec());
        let window = &seen[seen.len() - width..];
        let x: Vec<_> = (0..inner)
            .map(|d| {
                let taps = (0..width).map(|k| conv.at(&[d, 0, k]) * window[k][d]);
                silu(taps.sum::<f64>() + weights["conv1d.bias"].at(&[d]))
            })
            .collect();
        let selected = times(&weights["x_proj.weight"], &x);
        let steps = times(&weights["dt_proj.weight"], &selected[..rank]);
        let (b, c) = selected[rank..].split_at(states);
        let gated = (0..inner).map(|d| {
            let step = (steps[d] + weights["dt_proj.bias"].at(&[d])).exp().ln_1p();
            let mut y = weights["D"].at(&[d]) * x[d];
            for n in 0..states {
                let decay = (-step * decays.at(&[d, n]).exp()).exp();
                held[d][n] = decay * held[d][n] + step * b[n] * x[d];
                y += c[n] * held[d][n];
            }
            y * silu(both[inner + d])
        });
        outputs.push(times(&weights["out_proj.weight"], &gated.collect::<Vec<_>>()));
    }
    outputs
}

#[test]
fn a_block_matches_the_oracle() {
    let mut block = block();
    let x = normal(1, &[2, 9, 6], Dtype::Float32);
    let tensor = Tensor::of(&x);
    let rows: Vec<_> = tensor.rows().map(<[f64]>::to_vec).collect();
    let weights = weights(&block);
    let expected = rows.chunks(9).flat_map(|rows| oracle(&weights, rows)).flatten().collect();
    let expected = Tensor::new(&[2, 9, 6], expected);
    assert_close("MambaBlock", &block.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

#[test]
fn a_block_trains_under_the_names_of_mamba_ssm() {
    assert_module(block(), &normal(1, &[2, 5, 6], Dtype::Float32), PARAMETERS);
}

#[test]
fn a_block_starts_as_the_paper_says() {
    let block = MambaBlock::new(40).unwrap();
    assert_eq!((block.A_log.shape(), block.dt_proj.weight.shape()), (&[80, 16][..], &[80, 3][..]));
    let decays = Tensor::of(&block.A_log);
    for row in decays.rows() {
        let expected = (1..=16).map(f64::from).map(f64::ln);
        assert!(row.iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 1e-6));
    }
    let steps = Tensor::of(block.dt_proj.bias.as_ref().as_ref().unwrap());
    let steps: Vec<_> = steps.values.iter().map(|bias| bias.exp().ln_1p()).collect();
    assert!(steps.iter().all(|step| (0.999e-3..=0.1001).contains(step)), "{steps:?}");
    assert!(steps.iter().any(|step| *step < 0.01) && steps.iter().any(|step| *step > 0.01));
}

#[test]
fn a_block_goes_on_step_by_step() {
    let mut block = block();
    let (mut prefilling, mut stepping) = (block.clone(), block.clone());
    let x = normal(2, &[2, 10, 6], Dtype::Float32);
    let whole = block.forward(&x).unwrap();
    let state = std::cell::RefCell::new(MambaState::default());
    assert_steps_follow_prompts(
        "MambaBlock",
        &x,
        &whole,
        |x| prefilling.forward((x, &mut *state.borrow_mut())).unwrap(),
        |x| stepping.step(x, &mut state.borrow_mut()).unwrap(),
    );
    let mut fresh = MambaState::default();
    let first = block.step(x.index((.., 0)), &mut fresh).unwrap();
    assert_close("first", &first, &Tensor::of(&whole.index((.., 0))), Tolerance::LAYER);
    assert_eq!(fresh.conv().unwrap().shape(), [2, 3, 12]);
    assert_eq!(fresh.scan().unwrap().shape(), [2, 12, 3]);
    fresh.reset();
    assert!(fresh.scan().is_none());
}

fn model(vocab_size: Option<i32>) -> Mamba {
    mlx_rs::random::seed(4).unwrap();
    MambaBuilder::new(6, 2).d_state(3).vocab_size(vocab_size).build().unwrap()
}

fn ids() -> Array {
    Array::from_slice(&[3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 8, 0], &[2, 6])
}

#[test]
fn a_model_goes_on_step_by_step() {
    for (mut model, x) in
        [(model(Some(9)), ids()), (model(None), normal(1, &[2, 6, 6], Dtype::Float32))]
    {
        let whole = model.forward(&x).unwrap();
        let states = std::cell::RefCell::new(model.states());
        let mut stepping = model.clone();
        assert_steps_follow_prompts(
            "Mamba",
            &x,
            &whole,
            |x| model.forward_with(x, &mut states.borrow_mut()).unwrap(),
            |x| stepping.step(x, &mut states.borrow_mut()).unwrap(),
        );
    }
}

#[test]
fn a_model_is_a_module_named_as_in_mamba_ssm() {
    let names: Vec<_> = ["0", "1"]
        .iter()
        .flat_map(|layer| {
            let mixer = PARAMETERS.iter().map(move |name| format!("layers.{layer}.mixer.{name}"));
            mixer.chain([format!("layers.{layer}.norm.weight")])
        })
        .chain(["norm_f.weight".to_owned()])
        .map(|name| format!("backbone.{name}"))
        .collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let mut plain = model(None);
    // The squares of what a norm without weights leaves add up to the same whatever it gets.
    plain.backbone.norm_f.weight.value = normal(9, &[6], Dtype::Float32);
    assert_module(plain, &normal(1, &[2, 5, 6], Dtype::Float32), &names);
    let with_vocabulary = model(Some(9)).parameters().flatten().into_keys().collect::<Vec<_>>();
    assert!(with_vocabulary.iter().any(|name| &**name == "backbone.embedding.weight"));
}

#[test]
fn a_block_of_mixed_precision_keeps_the_dtype_of_its_outer_weights() {
    let mut exact = block();
    let x = normal(1, &[2, 9, 6], Dtype::Float32);
    let expected = Tensor::of(&exact.forward(&x).unwrap());
    let mut half = exact.clone();
    let outer = ["in_proj.weight", "out_proj.weight"];
    let mut parameters = half.parameters_mut().flatten();
    for name in outer {
        let weight = parameters.get_mut(name).unwrap();
        **weight = weight.as_dtype(Dtype::Bfloat16).unwrap();
    }
    let y = half.forward(&x.as_dtype(Dtype::Bfloat16).unwrap()).unwrap();
    assert_eq!(y.dtype(), Dtype::Bfloat16);
    // Four roundings to 2^-9 of numbers below one.
    assert_close("bf16", &y, &expected, Tolerance { rtol: 8e-3, atol: 8e-3 });
}

#[test]
fn bad_input_is_an_error_and_leaves_the_state() {
    assert!(MambaBlock::new(0).is_err());
    for builder in [
        MambaBlockBuilder::new(4).d_state(0),
        MambaBlockBuilder::new(4).d_conv(0),
        MambaBlockBuilder::new(4).expand(0),
        MambaBlockBuilder::new(4).expand(i32::MAX),
        MambaBlockBuilder::new(4).dt_rank(0),
        MambaBlockBuilder::new(4).dt_range((0.0, 1.0)),
        MambaBlockBuilder::new(4).dt_range((1.0, 0.5)),
    ] {
        assert!(builder.clone().build().is_err(), "{builder:?}");
    }
    assert!(Mamba::new(4, 0).is_err());
    let mut block = block();
    let mut state = MambaState::default();
    block.step(normal(1, &[2, 6], Dtype::Float32), &mut state).unwrap();
    let before = Tensor::of(state.scan().unwrap());
    let other_batch = block.step(normal(1, &[3, 6], Dtype::Float32), &mut state);
    let error = other_batch.unwrap_err().to_string();
    assert!(
        error.starts_with("[causal_conv1d] initial_state must have shape [3, 3, 12]"),
        "{error}"
    );
    assert_eq!(Tensor::of(state.scan().unwrap()), before);
    let error = block.forward(&normal(1, &[2, 5, 7], Dtype::Float32)).unwrap_err();
    assert!(error.what().starts_with("[MambaBlock] x must have shape [B, L, 6]"), "{error}");
    let mut model = model(Some(9));
    assert!(model.step(ids().index((.., 0)), &mut []).is_err());
    let error = model.forward(&normal(1, &[2, 6], Dtype::Float32)).unwrap_err();
    assert!(error.what().starts_with("[Mamba] ids must have dtype"), "{error}");
}
