use mlx_primitives::{
    cache::{Cache, SimpleKvCache},
    layers::{
        GroupedQueryAttention, GroupedQueryAttentionBuilder, MultiQueryAttention,
        MultiQueryAttentionBuilder,
    },
    norm::RmsNorm,
    rope::Rope,
};
use mlx_rs::{Array, builder::Builder, module::Module};

use super::{
    DIMS, HEADS, input,
    oracle::{self, Heads, Weights},
    per_sequence,
};
use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
};

const PARAMETERS: &[&str] = &["key.weight", "output.weight", "query.weight", "value.weight"];

fn grouped() -> GroupedQueryAttentionBuilder {
    mlx_rs::random::seed(7).unwrap();
    GroupedQueryAttentionBuilder::new(DIMS, 4, 2).rope(Rope::new(4).unwrap())
}

fn multi() -> MultiQueryAttentionBuilder {
    mlx_rs::random::seed(7).unwrap();
    MultiQueryAttentionBuilder::new(DIMS, 4).rope(Rope::new(4).unwrap())
}

#[test]
fn both_match_the_oracle() {
    let x = input(2, 6);
    let (scale, causal) = (0.3_f32, false);
    let mut grouped = grouped().scale(scale).causal(causal).build().unwrap();
    let mut multi = multi().scale(scale).causal(causal).build().unwrap();
    let heads = Heads { scale: scale.into(), causal, ..HEADS };
    let expected = |weights: Weights, keys| {
        let heads = Heads { keys, ..heads };
        per_sequence(&x, |rows| oracle::attention(&weights, "", rows, heads))
    };
    let (of_grouped, of_multi) = (Weights::of(&grouped), Weights::of(&multi));
    let y = grouped.forward(&x).unwrap();
    assert_close("GroupedQueryAttention", &y, &expected(of_grouped, 2), Tolerance::LAYER);
    let y = multi.forward(&x).unwrap();
    assert_close("MultiQueryAttention", &y, &expected(of_multi, 1), Tolerance::LAYER);
}

#[test]
fn both_train_save_and_compose() {
    let x = input(2, 5);
    assert_module(grouped().build().unwrap(), &x, PARAMETERS);
    assert_module(multi().build().unwrap(), &x, PARAMETERS);
    let normed = multi().qk_norm(RmsNorm::new(4).unwrap()).build().unwrap();
    assert!(normed.attention.query_norm.is_some());
}

#[test]
fn a_cache_holds_the_heads_of_keys() {
    let (mut multi, mut cache) = (multi().build().unwrap(), SimpleKvCache::new());
    let x = input(1, 5);
    let whole = multi.forward(&x).unwrap();
    let parts = mlx_rs::ops::split_at_indices(&x, &[3], 1).unwrap();
    let parts: Vec<Array> =
        parts.iter().map(|part| multi.forward((part, &mut cache)).unwrap()).collect();
    let joined = mlx_rs::ops::concatenate(&parts, 1).unwrap();
    let whole = crate::support::tensor::Tensor::of(&whole);
    assert_close("in two parts", &joined, &whole, Tolerance::LAYER);
    assert_eq!(cache.len(), 5);
    assert_eq!(cache.nbytes(), 2 * 256 * 4 * 4, "one head of four f32, for 256 tokens");
}

#[test]
fn sizes_and_biases_are_those_asked_for() {
    let biased = GroupedQueryAttentionBuilder::new(12, 4, 2).head_dim(6).bias(true);
    let mut biased = biased.output_bias(true).build().unwrap();
    let weights = Weights::of(&biased);
    for name in ["key.bias", "output.bias", "query.bias", "value.bias"] {
        assert!(weights.names().any(|found| found == name), "{name}");
    }
    let x = mlx_rs::ops::ones::<f32>(&[1, 3, 12]).unwrap();
    assert_eq!(biased.forward(&x).unwrap().shape(), [1, 3, 12]);
    let refused = GroupedQueryAttention::new(12, 4, 3).unwrap_err().to_string();
    assert_eq!(refused, "[Attention] num_kv_heads must divide 4 but got 3");
    assert!(MultiQueryAttention::new(12, 5).is_err());
}
