mod mamba;

use mlx_rs::{
    Array,
    ops::{concatenate, indexing::IndexOp},
};

use crate::support::{
    compare::{Tolerance, assert_close},
    tensor::Tensor,
};

/// Checks that a prompt at once and then token by token gives what one long call gives.
fn assert_steps_follow_prompts(
    what: &str,
    x: &Array,
    whole: &Array,
    mut prompt: impl FnMut(&Array) -> Array,
    mut step: impl FnMut(&Array) -> Array,
) {
    let half = x.dim(1) / 2;
    let mut outputs = vec![prompt(&x.index((.., ..half)))];
    for t in half..x.dim(1) {
        outputs.push(step(&x.index((.., t))).expand_dims(1).unwrap());
    }
    let joined = concatenate(&outputs, 1).unwrap();
    assert_close(what, &joined, &Tensor::of(whole), Tolerance::LAYER);
}
