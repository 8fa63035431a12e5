use std::cell::RefCell;

use mlx_primitives::ssm::{Mamba2Block, Mamba2BlockBuilder, MambaBuilder, MambaKind, MambaState};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::{Module, ModuleParameters, Param},
    nn,
    ops::indexing::IndexOp,
    optimizers::{Adam, Optimizer},
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
    "dt_bias",
    "in_proj.weight",
    "norm.weight",
    "out_proj.weight",
];

/// Two groups of two heads of three channels.
fn builder() -> Mamba2BlockBuilder {
    Mamba2BlockBuilder::new(6).d_state(5).head_dim(3).n_groups(2).chunk_size(4)
}

/// With weights that are no longer those it starts with, so that none is the same for all channels or heads.
fn block() -> Mamba2Block {
    mlx_rs::random::seed(3).unwrap();
    let mut block = builder().build().unwrap();
    block.D = Param::new(normal(11, &[4], Dtype::Float32));
    block.dt_bias = Param::new(normal(12, &[4], Dtype::Float32));
    block.norm.weight = Param::new(normal(13, &[12], Dtype::Float32));
    block
}

/// `rms_norm` of each half of a row.
fn normed(row: &[f64], weight: &Tensor, groups: usize) -> Vec<f64> {
    let size = row.len() / groups;
    let scale = |group: &[f64]| {
        let squares: f64 = group.iter().map(|x| x * x).sum();
        (squares / size as f64 + 1e-5).sqrt().recip()
    };
    let scales: Vec<_> = row.chunks(size).map(scale).collect();
    (0..row.len()).map(|d| row[d] * scales[d / size] * weight.at(&[d])).collect()
}

/// One sequence, step by step, by the equations of the paper; the heads are of `size` channels.
fn oracle(weights: &Weights, rows: &[Vec<f64>], [size, groups]: [usize; 2]) -> Vec<Vec<f64>> {
    let (conv, heads) = (&weights["conv1d.weight"], weights["A_log"].shape[0]);
    let (mixed, width, inner) = (conv.shape[0], conv.shape[2], heads * size);
    let states = (mixed - inner) / 2 / groups;
    let mut held = vec![vec![0.0; states]; inner];
    let mut seen: Vec<Vec<f64>> = vec![vec![0.0; mixed]; width - 1];
    let mut outputs = Vec::new();
    for row in rows {
        let all = times(&weights["in_proj.weight"], row);
        seen.push(all[inner..inner + mixed].to_vec());
        let window = &seen[seen.len() - width..];
        let xbc: Vec<_> = (0..mixed)
            .map(|d| {
                let taps = (0..width).map(|k| conv.at(&[d, 0, k]) * window[k][d]);
                silu(taps.sum::<f64>() + weights["conv1d.bias"].at(&[d]))
            })
            .collect();
        let gated = (0..inner).map(|d| {
            let head = d / size;
            let group = head / (heads / groups);
            let step = all[inner + mixed + head] + weights["dt_bias"].at(&[head]);
            let step = step.exp().ln_1p();
            let decay = (-step * weights["A_log"].at(&[head]).exp()).exp();
            let mut y = weights["D"].at(&[head]) * xbc[d];
            for n in 0..states {
                let b = xbc[inner + group * states + n];
                let c = xbc[inner + (groups + group) * states + n];
                held[d][n] = decay * held[d][n] + step * b * xbc[d];
                y += c * held[d][n];
            }
            y * silu(all[d])
        });
        let y = normed(&gated.collect::<Vec<_>>(), &weights["norm.weight"], groups);
        outputs.push(times(&weights["out_proj.weight"], &y));
    }
    outputs
}

fn expected(block: &Mamba2Block, x: &Array, sizes: [usize; 2]) -> Tensor {
    let (tensor, weights) = (Tensor::of(x), weights(block));
    let rows: Vec<_> = tensor.rows().map(<[f64]>::to_vec).collect();
    let sequences = rows.chunks(tensor.shape[1]);
    let values = sequences.flat_map(|rows| oracle(&weights, rows, sizes)).flatten().collect();
    Tensor::new(&tensor.shape, values)
}

#[test]
fn a_block_matches_the_oracle() {
    let x = normal(1, &[2, 9, 6], Dtype::Float32);
    mlx_rs::random::seed(5).unwrap();
    let fresh = Mamba2BlockBuilder::new(6).d_state(3).head_dim(4).build().unwrap();
    for (mut block, sizes) in [(block(), [3, 2]), (fresh, [4, 1])] {
        let expected = expected(&block, &x, sizes);
        let y = block.forward(&x).unwrap();
        assert_close("Mamba2Block", &y, &expected, Tolerance::LAYER);
    }
}

#[test]
fn a_block_trains_under_the_names_of_mamba_ssm() {
    assert_module(block(), &normal(1, &[2, 5, 6], Dtype::Float32), PARAMETERS);
    let biased = builder().bias(true).conv_bias(false).build().unwrap();
    let names = biased.parameters().flatten().into_keys().collect::<Vec<_>>();
    let has = |name: &str| names.iter().any(|found| &**found == name);
    assert!(has("in_proj.bias") && has("out_proj.bias") && !has("conv1d.bias"), "{names:?}");
}

#[test]
fn a_block_fits_a_target() {
    let x = normal(1, &[2, 12, 6], Dtype::Float32);
    let target = block().forward(&x).unwrap();
    mlx_rs::random::seed(4).unwrap();
    let mut block = builder().build().unwrap();
    let loss = |block: &mut Mamba2Block, x: &Array| -> mlx_rs::error::Result<Array> {
        block.forward(x)?.subtract(&target)?.square()?.mean(None)
    };
    let mut adam = Adam::new(3e-2);
    let losses = (0..60).map(|_| {
        let (loss, gradients) = nn::value_and_grad(loss)(&mut block, &x).unwrap();
        adam.update(&mut block, gradients).unwrap();
        loss.item_exact::<f32>()
    });
    let losses: Vec<_> = losses.collect();
    assert!(losses[59] < losses[0] / 50.0, "{losses:?}");
}

#[test]
fn a_block_starts_as_the_paper_says() {
    let block = Mamba2Block::new(64).unwrap();
    let shapes = [&block.conv1d.weight, &block.A_log, &block.dt_bias, &block.norm.weight];
    let shapes = shapes.map(|array| array.shape().to_vec());
    assert_eq!(shapes, [vec![384, 1, 4], vec![2], vec![2], vec![128]]);
    let weights = weights(&block);
    assert_eq!(weights["in_proj.weight"].shape, [2 * 128 + 2 * 128 + 2, 64]);
    let many = Mamba2BlockBuilder::new(64).head_dim(1).build().unwrap();
    let decays = Tensor::of(&many.A_log).values;
    assert!(decays.iter().all(|log| (0.999..=16.001).contains(&log.exp())), "{decays:?}");
    assert!(decays.iter().any(|log| *log < 1.0) && decays.iter().any(|log| *log > 2.5));
    let steps = Tensor::of(&many.dt_bias).values;
    let steps: Vec<_> = steps.iter().map(|bias| bias.exp().ln_1p()).collect();
    assert!(steps.iter().all(|step| (0.999e-3..=0.1001).contains(step)), "{steps:?}");
    assert!(steps.iter().any(|step| *step < 0.01) && steps.iter().any(|step| *step > 0.01));
}

#[test]
fn a_block_goes_on_step_by_step() {
    let mut block = block();
    let (mut prefilling, mut stepping) = (block.clone(), block.clone());
    let x = normal(2, &[2, 14, 6], Dtype::Float32);
    let whole = block.forward(&x).unwrap();
    let state = RefCell::new(MambaState::default());
    assert_steps_follow_prompts(
        "Mamba2Block",
        &x,
        &whole,
        |x| prefilling.forward((x, &mut *state.borrow_mut())).unwrap(),
        |x| stepping.step(x, &mut state.borrow_mut()).unwrap(),
    );
    let mut state = MambaState::default();
    let first = block.step(x.index((.., 0)), &mut state).unwrap();
    assert_close("first", &first, &Tensor::of(&whole.index((.., 0))), Tolerance::LAYER);
    assert_eq!(state.conv().unwrap().shape(), [2, 3, 32]);
    assert_eq!(state.scan().unwrap().shape(), [2, 4, 3, 5]);
    let rest = block.forward((&x.index((.., 1..)), &mut state)).unwrap();
    assert_close("rest", &rest, &Tensor::of(&whole.index((.., 1..))), Tolerance::LAYER);
    let nothing = block.forward((&x.index((.., ..0)), &mut state)).unwrap();
    assert_eq!(nothing.shape(), [2, 0, 6]);
}

#[test]
fn a_model_of_such_blocks_goes_on_step_by_step() {
    mlx_rs::random::seed(4).unwrap();
    let kind = MambaKind::Mamba2 { head_dim: 4, n_groups: 3 };
    let mut model = MambaBuilder::new(6, 2).kind(kind).d_state(3).vocab_size(9).build().unwrap();
    let ids = Array::from_slice(&[3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 8, 0], &[2, 6]);
    let whole = model.forward(&ids).unwrap();
    let states = RefCell::new(model.states());
    let mut stepping = model.clone();
    assert_steps_follow_prompts(
        "Mamba of Mamba-2",
        &ids,
        &whole,
        |x| model.forward_with(x, &mut states.borrow_mut()).unwrap(),
        |x| stepping.step(x, &mut states.borrow_mut()).unwrap(),
    );
    assert_eq!(states.borrow()[1].scan().unwrap().shape(), [2, 3, 4, 3]);
}

#[test]
fn a_model_of_such_blocks_trains_under_the_names_of_mamba_ssm() {
    mlx_rs::random::seed(4).unwrap();
    let kind = MambaKind::Mamba2 { head_dim: 4, n_groups: 1 };
    let mut model = MambaBuilder::new(6, 1).kind(kind).d_state(3).build().unwrap();
    // The squares of what a norm without weights leaves add up to the same whatever it gets.
    model.backbone.norm_f.weight.value = normal(9, &[6], Dtype::Float32);
    let mixer = PARAMETERS.iter().map(|name| format!("backbone.layers.0.mixer.{name}"));
    let norms = ["backbone.layers.0.norm.weight", "backbone.norm_f.weight"].map(str::to_owned);
    let names: Vec<_> = mixer.chain(norms).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    assert_module(model, &normal(1, &[2, 5, 6], Dtype::Float32), &names);
    let paper = MambaBuilder::new(32, 1).kind(MambaKind::MAMBA2).build().unwrap();
    let weights = weights(&paper);
    assert_eq!(weights["backbone.layers.0.mixer.conv1d.weight"].shape, [64 + 2 * 128, 1, 4]);
    let bad = MambaBuilder::new(6, 1).kind(MambaKind::MAMBA2).build().unwrap_err().to_string();
    assert!(bad.starts_with("[Mamba2Block] head_dim must divide dims · expand = 12"), "{bad}");
}

#[test]
fn a_block_of_mixed_precision_keeps_the_dtype_of_its_outer_weights() {
    let mut exact = block();
    let x = normal(1, &[2, 9, 6], Dtype::Float32);
    let expected = Tensor::of(&exact.forward(&x).unwrap());
    let mut half = exact.clone();
    let mut parameters = half.parameters_mut().flatten();
    for name in ["in_proj.weight", "out_proj.weight"] {
        let weight = parameters.get_mut(name).unwrap();
        **weight = weight.as_dtype(Dtype::Bfloat16).unwrap();
    }
    let x = x.as_dtype(Dtype::Bfloat16).unwrap();
    let y = half.forward(&x).unwrap();
    let step = half.step(x.index((.., 0)), &mut MambaState::default()).unwrap();
    assert_eq!((y.dtype(), step.dtype()), (Dtype::Bfloat16, Dtype::Bfloat16));
    // A few roundings to 2^-9 of numbers of about one.
    // Weights and what goes between them are rounded to 2^-9: an error of 0.012 was measured, of numbers up to 1.3.
    assert_close("bf16", &y, &expected, Tolerance { rtol: 1e-2, atol: 1e-2 });
}

#[test]
fn bad_input_is_an_error_and_leaves_the_state() {
    assert!(Mamba2Block::new(0).is_err());
    for (builder, expected) in [
        (builder().d_state(0), "d_state must be at least 1"),
        (builder().d_state(i32::MAX), "d_state must leave what is projected below 2^31 numbers"),
        (builder().d_conv(0), "d_conv must be at least 1"),
        (builder().expand(0), "expand must be at least 1"),
        (builder().expand(i32::MAX), "expand must leave dims · expand below 2^31"),
        (builder().head_dim(0), "head_dim must be at least 1"),
        (builder().head_dim(5), "head_dim must divide dims · expand = 12 but got 5"),
        (builder().n_groups(0), "n_groups must be at least 1"),
        (builder().n_groups(3), "n_groups must divide the 4 heads but got 3"),
        (builder().chunk_size(0), "chunk_size must be at least 1"),
        (builder().dt_range((0.0, 1.0)), "dt_range.0 must be finite and above 0"),
        (builder().dt_range((1.0, 0.5)), "dt_range must rise"),
    ] {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.starts_with(&format!("[Mamba2Block] {expected}")), "{error}");
    }
    let mut block = block();
    let mut state = MambaState::default();
    block.step(normal(1, &[2, 6], Dtype::Float32), &mut state).unwrap();
    let before = Tensor::of(state.scan().unwrap());
    let other_batch = block.step(normal(1, &[3, 6], Dtype::Float32), &mut state);
    let error = other_batch.unwrap_err().to_string();
    let expected = "[causal_conv1d] initial_state must have shape [3, 3, 32]";
    assert!(error.starts_with(expected), "{error}");
    assert_eq!(Tensor::of(state.scan().unwrap()), before);
    let error = block.forward(&normal(1, &[2, 5, 7], Dtype::Float32)).unwrap_err();
    assert!(error.what().starts_with("[Mamba2Block] x must have shape [B, L, 6]"), "{error}");
    let error = block.step(Array::from_slice(&[1; 6], &[1, 6]), &mut state).unwrap_err();
    assert!(error.to_string().starts_with("[Mamba2Block] x must have dtype"), "{error}");
}
