//! The layers that are made of linear and sparse attention.

use std::f64::consts::FRAC_PI_2;

use mlx_primitives::{
    Layout,
    attention::{BigBirdAttentionOptions, BlockPattern, FeatureMap},
    layers::*,
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::{Module, ModuleParameters},
    ops::{concatenate, indexing::TryIndexOp},
    random,
};

use super::{
    linear_oracle::{Rule, average, dot},
    linear_support::refusal,
    visible_oracle::attend_visible,
};
use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

const DIMS: i32 = 12;
const SIZE: usize = 3;
const NAMES: &[&str] = &["query.weight", "key.weight", "value.weight", "output.weight"];

fn input(length: i32) -> Array {
    normal(5, &[2, length, DIMS], Dtype::Float32)
}

/// `[B, S, dims]` by `[heads · D, dims]`, as `[B, S, heads, D]`.
fn project(x: &Tensor, weight: &Array) -> Tensor {
    let weight = Tensor::of(weight);
    let (rows, size) = (weight.shape[0], x.shape[2]);
    Tensor::from_fn(&[x.shape[0], x.shape[1], rows / SIZE, SIZE], |i| {
        let start = (i[0] * x.shape[1] + i[1]) * size;
        let row = (i[2] * SIZE + i[3]) * size;
        dot(&x.values[start..start + size], &weight.values[row..row + size])
    })
}

/// `[B, S, H, D]` by `[dims, H · D]`, as `[B, S, dims]`.
fn merge(heads: &Tensor, weight: &Array) -> Tensor {
    let weight = Tensor::of(weight);
    let size = heads.shape[2] * heads.shape[3];
    Tensor::from_fn(&[heads.shape[0], heads.shape[1], weight.shape[0]], |i| {
        let start = (i[0] * heads.shape[1] + i[1]) * size;
        dot(&heads.values[start..start + size], &weight.values[i[2] * size..][..size])
    })
}

/// The weight of that name, whatever the layer.
fn weight(module: &impl ModuleParameters, name: &str) -> Array {
    module.parameters().flatten()[name].clone()
}

/// Compares a layer with its projections around what `attend` makes of `[q, k, v]`.
fn check<M>(what: &str, mut module: M, length: i32, attend: impl Fn([&Tensor; 3]) -> Tensor)
where
    M: ModuleParameters,
    for<'a> M: Module<&'a Array, Output = Array, Error = Exception>,
{
    let x = input(length);
    let of = Tensor::of(&x);
    let [q, k, v] = ["query.weight", "key.weight", "value.weight"]
        .map(|name| project(&of, &weight(&module, name)));
    let expected = merge(&attend([&q, &k, &v]), &weight(&module, "output.weight"));
    let y = module.forward(&x).unwrap();
    assert_close(what, &y, &expected, Tolerance::LAYER);
}

fn linear() -> LinearAttention {
    let builder = LinearAttentionBuilder::new(DIMS, 4).num_kv_heads(2).chunk_size(3);
    builder.feature_map(FeatureMap::Exp).causal(true).build().unwrap()
}

fn performer() -> PerformerAttention {
    let builder = PerformerAttentionBuilder::new(DIMS, 4).num_kv_heads(2).num_features(7);
    builder.causal(true).seed(3_u64).scale(0.5).build().unwrap()
}

fn cosformer() -> CosFormerAttention {
    let builder = CosFormerAttentionBuilder::new(DIMS, 4).num_kv_heads(2).max_length(20);
    builder.causal(true).eps(1e-3).build().unwrap()
}

fn block_sparse(causal: bool) -> BlockSparseAttention {
    let pattern = BlockPattern { random_blocks: 1, causal, ..Default::default() };
    let builder = BlockSparseAttentionBuilder::new(DIMS, 4).num_kv_heads(2).block_size(4);
    builder.pattern(pattern).build().unwrap()
}

fn bigbird_options() -> BigBirdAttentionOptions {
    // The layout is not that of the layer, which has its own.
    BigBirdAttentionOptions {
        block_size: 2,
        global_blocks: 1,
        random_blocks: 1,
        scale: Some(0.3),
        layout: Layout::Bhsd,
        ..Default::default()
    }
}

fn bigbird() -> BigBirdAttention {
    BigBirdAttentionBuilder::new(DIMS, 4).options(bigbird_options()).build().unwrap()
}

fn longformer(global: bool) -> LongformerAttention {
    let builder = LongformerAttentionBuilder::new(DIMS, 4).num_kv_heads(2).window(2);
    builder.num_global_tokens(2).global_projections(global).build().unwrap()
}

#[test]
fn linear_layers_are_their_functions_between_projections() {
    check("LinearAttention", linear(), 8, |inputs| {
        average(inputs, Rule { causal: true, eps: 0.0 }, |q, k, _, _| {
            q.iter().zip(k).map(|(q, k)| (q + k).exp()).sum()
        })
    });
    let performer = performer();
    let features = Tensor::of(performer.features());
    check("PerformerAttention", performer, 8, |inputs| {
        average(inputs, Rule { causal: true, eps: 0.0 }, |q, k, _, _| {
            let half = (dot(q, q) + dot(k, k)) / 4.0;
            let exponent = |w: &[f64]| 0.5_f64.sqrt() * (dot(w, q) + dot(w, k)) - half;
            features.rows().map(|w| exponent(w).exp()).sum()
        })
    });
    check("CosFormerAttention", cosformer(), 8, |inputs| {
        average(inputs, Rule { causal: true, eps: 1e-3 }, |q, k, i, j| {
            let near = (FRAC_PI_2 * (i - j) as f64 / 20.0).cos();
            near * q.iter().zip(k).map(|(q, k)| q.max(0.0) * k.max(0.0)).sum::<f64>()
        })
    });
}

#[test]
fn sparse_layers_are_their_functions_between_projections() {
    for causal in [false, true] {
        let pattern = BlockPattern { random_blocks: 1, causal, ..Default::default() };
        let rows = pattern.layout(4, 19, 19).unwrap();
        check("BlockSparseAttention", block_sparse(causal), 19, |inputs| {
            attend_visible(inputs, None, |i, j| {
                rows.rows()[i / 4].contains(&(j as i32 / 4)) && (!causal || j <= i)
            })
        });
    }
    let rows = bigbird_options().pattern().layout(2, 19, 19).unwrap();
    check("BigBirdAttention", bigbird(), 19, |inputs| {
        let scale = Some(f64::from(0.3_f32));
        attend_visible(inputs, scale, |i, j| rows.rows()[i / 2].contains(&(j as i32 / 2)))
    });
    check("LongformerAttention", longformer(false), 19, |inputs| {
        attend_visible(inputs, None, |i, j| i < 2 || j < 2 || i.abs_diff(j) <= 2)
    });
}

#[test]
fn global_tokens_go_through_their_own_projections() {
    let mut module = longformer(true);
    let x = input(9);
    let of = Tensor::of(&x);
    let heads = |names: [&str; 3]| names.map(|name| project(&of, &weight(&module, name)));
    let near = heads(["query.weight", "key.weight", "value.weight"]);
    let far = heads(["query_global.weight", "key_global.weight", "value_global.weight"]);
    let output = weight(&module, "output.weight");
    let mut check = |tokens: Option<&[i32]>, is_global: &dyn Fn(usize) -> bool| {
        let near = attend_visible(near.each_ref(), None, |i, j| is_global(j) || i.abs_diff(j) <= 2);
        let far = attend_visible(far.each_ref(), None, |_, _| true);
        let all = Tensor::from_fn(&near.shape, |index| {
            if is_global(index[1]) { far.at(index) } else { near.at(index) }
        });
        let input = LongformerAttentionInput { x: &x, global_tokens: tokens };
        let y = module.forward(input).unwrap();
        assert_close("LongformerAttention", &y, &merge(&all, &output), Tolerance::LAYER);
    };
    check(None, &|token| token < 2);
    check(Some(&[7, 3]), &|token| token == 3 || token == 7);
    check(Some(&[]), &|_| false);
}

#[test]
fn they_train_save_and_compose_and_nothing_else_is_trained() {
    let x = input(9);
    assert_module(linear(), &x, NAMES);
    assert_module(performer(), &x, NAMES);
    assert_module(cosformer(), &x, NAMES);
    assert_module(block_sparse(true), &x, NAMES);
    assert_module(bigbird(), &x, NAMES);
    assert_module(longformer(false), &x, NAMES);
    let global = ["query_global.weight", "key_global.weight", "value_global.weight"];
    assert_module(longformer(true), &x, &[NAMES, &global].concat());
}

#[test]
fn biases_are_those_of_queries_keys_and_values() {
    let names = |module: &dyn ModuleParameters| {
        let names = module.parameters().flatten().into_keys();
        let mut names: Vec<_> = names.filter(|name| name.ends_with("bias")).collect();
        names.sort();
        names.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let expected = ["key.bias", "query.bias", "value.bias"];
    assert_eq!(names(&LinearAttentionBuilder::new(DIMS, 4).bias(true).build().unwrap()), expected);
    let longformer = LongformerAttentionBuilder::new(DIMS, 4).bias(true).build().unwrap();
    assert_eq!(names(&longformer).len(), 6);
    assert!(names(&bigbird()).is_empty());
}

fn check_cache<M>(mut module: M)
where
    for<'a> M: Module<&'a Array, Output = Array, Error = Exception>
        + Module<(&'a Array, &'a mut LinearAttentionCache), Output = Array, Error = Exception>,
{
    let x = input(9);
    let mut cache = LinearAttentionCache::default();
    assert!(cache.is_empty() && cache.state().is_none());
    let mut parts = Vec::new();
    for piece in [0..5, 5..6, 6..7, 7..9] {
        let end = piece.end;
        let x = x.try_index((.., piece)).unwrap();
        parts.push(module.forward((&x, &mut cache)).unwrap());
        assert_eq!(cache.len(), end);
        // What is refused changes nothing.
        let wide = normal(1, &[2, 1, DIMS + 1], Dtype::Float32);
        module.forward((&wide, &mut cache)).unwrap_err();
        let other_batch = normal(1, &[3, 1, DIMS], Dtype::Float32);
        module.forward((&other_batch, &mut cache)).unwrap_err();
        assert_eq!(cache.len(), end);
    }
    let expected = Tensor::of(&module.forward(&x).unwrap());
    let got = concatenate(&parts, 1).unwrap();
    assert_close("token by token", &got, &expected, Tolerance::LAYER);
    cache.reset();
    assert!(cache.is_empty() && cache.state().is_none());
}

#[test]
fn a_cache_goes_on_where_the_last_call_ended() {
    check_cache(linear());
    check_cache(performer());
    check_cache(cosformer());
}

#[test]
fn cosformer_needs_a_length_for_a_cache() {
    let mut module = CosFormerAttention::new(DIMS, 4).unwrap();
    let x = input(3);
    let error = module.forward((&x, &mut LinearAttentionCache::default())).unwrap_err();
    assert_eq!(
        error.what(),
        "[CosFormerAttention] max_length must be given with a cache but got none"
    );
    assert_eq!(module.forward(&x).unwrap().shape(), [2, 3, DIMS]);
}

#[test]
fn a_seed_decides_the_features_until_they_are_redrawn() {
    let of = |seed: u64| {
        let module = PerformerAttentionBuilder::new(DIMS, 4).seed(seed).build().unwrap();
        Tensor::of(module.features())
    };
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
    assert_eq!(of(1).shape, [4, 3], "3 ln 3, rounded up");
    let mut module = performer();
    let before = Tensor::of(module.features());
    module.redraw(random::key(9).unwrap()).unwrap();
    let after = Tensor::of(module.features());
    assert_eq!(before.shape, after.shape);
    assert_ne!(before, after);
    assert!(module.redraw(Array::from_int(1)).is_err());
}

#[test]
fn bad_sizes_are_named() {
    let of = LinearAttentionBuilder::new;
    let form = "[LinearAttention]";
    let linear = |builder: LinearAttentionBuilder| refusal(builder.build());
    assert_eq!(linear(of(0, 1)), format!("{form} dims must be at least 1 but got 0"));
    assert_eq!(linear(of(4, 0)), format!("{form} num_heads must be at least 1 but got 0"));
    assert_eq!(linear(of(4, 3)), format!("{form} num_heads must divide 4 but got 3"));
    let kv = |heads: i32| linear(of(12, 4).num_kv_heads(heads));
    assert_eq!(kv(0), format!("{form} num_kv_heads must be at least 1 but got 0"));
    assert_eq!(kv(3), format!("{form} num_kv_heads must divide 4 but got 3"));
    assert!(linear(of(4, 2).eps(-1.0)).starts_with(&format!("{form} eps must be")));
    assert!(linear(of(4, 2).chunk_size(0)).starts_with(&format!("{form} chunk_size must be")));
    assert!(LinearAttention::new(4, 3).is_err());

    let performer = |builder: PerformerAttentionBuilder| refusal(builder.build());
    let of = PerformerAttentionBuilder::new;
    assert!(performer(of(4, 3)).starts_with("[PerformerAttention] num_heads must divide 4"));
    assert!(performer(of(4, 2).scale(0.0)).starts_with("[PerformerAttention] scale must be"));
    assert!(performer(of(4, 2).chunk_size(0)).starts_with("[PerformerAttention] chunk_size must"));
    assert!(performer(of(4, 2).num_features(0)).contains("num_features must be from 1"));
    assert!(PerformerAttention::new(4, 3).is_err());

    let cosformer = |builder: CosFormerAttentionBuilder| refusal(builder.build());
    let of = CosFormerAttentionBuilder::new;
    assert!(cosformer(of(4, 3)).starts_with("[CosFormerAttention] num_heads must divide 4"));
    assert!(cosformer(of(4, 2).max_length(0)).starts_with("[CosFormerAttention] max_length must"));
    assert!(cosformer(of(4, 2).eps(f32::NAN)).starts_with("[CosFormerAttention] eps must be"));
    assert!(cosformer(of(4, 2).chunk_size(0)).starts_with("[CosFormerAttention] chunk_size must"));

    let blocks = |builder: BlockSparseAttentionBuilder| refusal(builder.build());
    let of = BlockSparseAttentionBuilder::new;
    let pattern = BlockPattern { before: -1, ..Default::default() };
    assert!(blocks(of(4, 3)).starts_with("[BlockSparseAttention] num_heads must divide 4"));
    assert!(blocks(of(4, 2).block_size(0)).starts_with("[BlockSparseAttention] block_size must"));
    assert!(blocks(of(4, 2).pattern(pattern)).starts_with("[BlockSparseAttention] before must be"));
    assert!(blocks(of(4, 2).scale(f32::NAN)).starts_with("[BlockSparseAttention] scale must be"));
    assert!(BlockSparseAttention::new(4, 3).is_err());

    let options = BigBirdAttentionOptions { random_blocks: -1, ..Default::default() };
    let error = refusal(BigBirdAttentionBuilder::new(4, 2).options(options).build());
    assert_eq!(error, "[BigBirdAttention] random_blocks must be at least 0 but got -1");
    assert!(refusal(BigBirdAttention::new(4, 3)).starts_with("[BigBirdAttention] num_heads must"));

    let longformer = |builder: LongformerAttentionBuilder| refusal(builder.build());
    let (of, form) = (LongformerAttentionBuilder::new, "[LongformerAttention]");
    assert!(longformer(of(4, 3)).starts_with(&format!("{form} num_heads must divide 4")));
    assert!(longformer(of(4, 2).window(-1)).starts_with(&format!("{form} window must be")));
    let negative = longformer(of(4, 2).num_global_tokens(-1));
    assert_eq!(negative, format!("{form} num_global_tokens must be at least 0 but got -1"));
    assert!(longformer(of(4, 2).scale(f32::NAN)).starts_with(&format!("{form} scale must be")));
}

#[test]
fn bad_inputs_are_named() {
    fn message<M>(mut module: M, x: &Array) -> String
    where
        for<'a> M: Module<&'a Array, Output = Array, Error = Exception>,
    {
        module.forward(x).unwrap_err().what().to_owned()
    }
    let wide = Array::zeros::<f32>(&[2, 3, 13]).unwrap();
    let ints = Array::zeros::<i32>(&[2, 3, 12]).unwrap();
    let form = "x must have shape [B, S, 12] but got [2, 3, 13]";
    assert_eq!(message(linear(), &wide), format!("[LinearAttention] {form}"));
    assert_eq!(message(performer(), &wide), format!("[PerformerAttention] {form}"));
    assert_eq!(message(cosformer(), &wide), format!("[CosFormerAttention] {form}"));
    assert_eq!(message(block_sparse(true), &wide), format!("[BlockSparseAttention] {form}"));
    assert_eq!(message(bigbird(), &wide), format!("[BigBirdAttention] {form}"));
    assert_eq!(message(longformer(true), &wide), format!("[LongformerAttention] {form}"));
    assert!(message(linear(), &ints).starts_with("[LinearAttention] x must have dtype"));
    let x = input(3);
    for global in [true, false] {
        let error = longformer(global).forward((&x, &[0, 3][..])).unwrap_err();
        assert!(error.what().ends_with("global_tokens must be from 0 to below 3 but got 3"));
    }
}

#[test]
fn empty_sequences_are_answered() {
    for shape in [[0, 3, 12], [2, 0, 12]] {
        let x = Array::zeros::<f32>(&shape).unwrap();
        let check = |y: Result<Array, Exception>| {
            let y = y.unwrap();
            y.eval().unwrap();
            assert_eq!(y.shape(), shape);
        };
        check(linear().forward(&x));
        check(performer().forward(&x));
        check(cosformer().forward(&x));
        check(block_sparse(false).forward(&x));
        check(bigbird().forward(&x));
        check(longformer(true).forward(&x));
        check(longformer(false).forward(&x));
    }
}
