mod grouped_query;
mod oracle;
mod turning_cache;

use mlx_primitives::{
    Error, Layout,
    activation::Activation,
    cache::{Cache, SimpleKvCache},
    layers::{
        Attention, AttentionBuilder, AttentionInput, DecoderBlock, DecoderBlockBuilder,
        GatedFeedForward, GatedFeedForwardBuilder, Projection, TokenEmbedding,
    },
    norm::{RmsNorm, RmsNormOptions},
    quant::{QuantizedEmbedding, QuantizedLinear, QuantizedWeight},
    rope::{Rope, RopeBuilder},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::{Module, ModuleParameters, ModuleParametersExt, Param, Parameter},
    nn,
    ops::concatenate,
    optimizers::{Adam, Optimizer},
    transforms::compile::compile_with_state,
};

use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};
use oracle::{Heads, Weights};

const DIMS: i32 = 16;
const HEADS: Heads =
    Heads { queries: 4, keys: 2, size: 4, rope_base: 10000.0, scale: 0.5, causal: true };

const BLOCK_PARAMETERS: &[&str] = &[
    "attention.key.weight",
    "attention.output.weight",
    "attention.query.weight",
    "attention.value.weight",
    "attention_norm.weight",
    "feed_forward.down.weight",
    "feed_forward.gate.weight",
    "feed_forward.up.weight",
    "feed_forward_norm.weight",
];

fn attention() -> Attention {
    mlx_rs::random::seed(7).unwrap();
    AttentionBuilder::new(DIMS, 4).num_kv_heads(2).rope(Rope::new(4).unwrap()).build().unwrap()
}

fn block() -> DecoderBlock {
    let attention = attention();
    DecoderBlock::new(DIMS, attention, GatedFeedForward::new(DIMS, 40).unwrap()).unwrap()
}

fn input(batch: i32, tokens: i32) -> Array {
    normal(11, &[batch, tokens, DIMS], Dtype::Float32)
}

/// Runs an oracle for one sequence on each sequence of a batch.
fn per_sequence(x: &Array, run: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>) -> Tensor {
    let x = Tensor::of(x);
    let rows: Vec<_> = x.rows().map(<[f64]>::to_vec).collect();
    let values = rows.chunks(x.shape[1]).flat_map(run).flatten().collect();
    Tensor::new(&x.shape, values)
}

#[test]
fn a_decoder_block_matches_the_oracle() {
    let (mut block, x) = (block(), input(2, 7));
    let weights = Weights::of(&block);
    let eps = RmsNormOptions::DEFAULT_EPS.into();
    let expected = per_sequence(&x, |rows| oracle::decoder_block(&weights, rows, HEADS, eps));
    assert_close("DecoderBlock", &block.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

#[test]
fn attention_matches_the_oracle() {
    let (mut attention, x) = (attention(), input(3, 5));
    let weights = Weights::of(&attention);
    let expected = per_sequence(&x, |rows| oracle::attention(&weights, "", rows, HEADS));
    assert_close("Attention", &attention.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

fn attention_with_norms(rope: Option<Rope>) -> Attention {
    mlx_rs::random::seed(7).unwrap();
    let builder = AttentionBuilder::new(DIMS, 4).num_kv_heads(2).rope(rope);
    let mut attention = builder.qk_norm(RmsNorm::new(4).unwrap()).build().unwrap();
    let norms = [(21, &mut attention.query_norm), (22, &mut attention.key_norm)];
    for (seed, norm) in norms {
        norm.as_mut().unwrap().weight.value = normal(seed, &[4], Dtype::Float32);
    }
    attention
}

#[test]
fn attention_with_normalized_heads_matches_the_oracle() {
    let x = input(3, 5);
    let rope = Rope::new(4).unwrap();
    // The oracle always turns, which position 0 alone does not show.
    for (mut attention, x) in
        [(attention_with_norms(Some(rope)), x), (attention_with_norms(None), input(15, 1))]
    {
        let weights = Weights::of(&attention);
        let expected = per_sequence(&x, |rows| oracle::attention(&weights, "", rows, HEADS));
        assert_close("Attention", &attention.forward(&x).unwrap(), &expected, Tolerance::LAYER);
    }
}

#[test]
fn normalized_heads_with_a_cache_are_the_whole_prompt_at_once() {
    let (mut attention, x) = (attention_with_norms(Some(Rope::new(4).unwrap())), input(2, 6));
    let whole = Tensor::of(&attention.forward(&x).unwrap());
    let mut cache = SimpleKvCache::new();
    let parts: Vec<_> = split(&x, &[3, 1, 2])
        .iter()
        .map(|part| attention.forward((part, &mut cache)).unwrap())
        .collect();
    assert_close("in chunks", &concatenate(&parts, 1).unwrap(), &whole, Tolerance::LAYER);
}

#[test]
fn norms_of_their_own_eps_are_heeded() {
    let (mut attention, x) = (attention_with_norms(Some(Rope::new(4).unwrap())), input(2, 5));
    let alike = Tensor::of(&attention.forward(&x).unwrap());
    let key_norm = attention.key_norm.as_mut().unwrap();
    // The same factor, written as an offset from one.
    key_norm.weight.value = key_norm.weight.subtract(Array::from_f32(1.0)).unwrap();
    key_norm.unit_offset = true;
    assert_close("one by one", &attention.forward(&x).unwrap(), &alike, Tolerance::LAYER);
}

#[test]
fn token_by_token_with_a_cache_is_the_whole_prompt_at_once() {
    let (mut block, x) = (block(), input(2, 9));
    let whole = Tensor::of(&block.forward(&x).unwrap());
    for chunks in [&[1; 9][..], &[4, 1, 4], &[8, 1]] {
        let mut cache = SimpleKvCache::new();
        let mut parts = Vec::new();
        for part in split(&x, chunks) {
            parts.push(block.forward((&part, &mut cache)).unwrap());
        }
        let joined = concatenate(&parts, 1).unwrap();
        assert_close(&format!("in chunks {chunks:?}"), &joined, &whole, Tolerance::LAYER);
        assert_eq!(cache.len(), 9);
    }
}

fn split(x: &Array, chunks: &[i32]) -> Vec<Array> {
    let ends: Vec<_> = chunks
        .iter()
        .scan(0, |end, chunk| {
            *end += chunk;
            Some(*end)
        })
        .collect();
    mlx_rs::ops::split_at_indices(x, &ends[..ends.len() - 1], 1).unwrap()
}

#[test]
fn a_mask_hides_what_it_says() {
    let (mut attention, x) = (attention(), input(1, 4));
    let mask = Array::from_slice(&[true, true, false, true], &[1, 1, 1, 4]);
    let masked = |attention: &mut Attention, x: &Array| attention.forward((x, &mask)).unwrap();
    let mut parts = split(&x, &[2, 1, 1]);
    let expected = Tensor::of(&masked(&mut attention, &x));
    parts[1] = normal(99, &[1, 1, DIMS], Dtype::Float32);
    let changed = Tensor::of(&masked(&mut attention, &concatenate(&parts, 1).unwrap()));
    for row in [0, 1, 3] {
        for d in 0..DIMS as usize {
            assert_eq!(changed.at(&[0, row, d]), expected.at(&[0, row, d]), "row {row}");
        }
    }
}

#[test]
fn layers_train_save_and_compose() {
    let x = input(2, 5);
    assert_module(block(), &x, BLOCK_PARAMETERS);
    let feed_forward = GatedFeedForwardBuilder::new(DIMS, 24)
        .activation(Activation::Gelu)
        .bias(true)
        .build()
        .unwrap();
    let names = ["gate.bias", "gate.weight", "up.bias", "up.weight", "down.bias", "down.weight"];
    assert_module(feed_forward, &x, &names);
    let names = ["key", "key_norm", "output", "query", "query_norm", "value"]
        .map(|name| format!("{name}.weight"));
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    assert_module(attention_with_norms(Some(Rope::new(4).unwrap())), &x, &names);
    let biased = AttentionBuilder::new(DIMS, 2).bias(true).output_bias(true).build().unwrap();
    let names = ["query", "key", "value", "output"]
        .map(|name| [format!("{name}.bias"), format!("{name}.weight")]);
    let names: Vec<_> = names.iter().flatten().map(String::as_str).collect();
    // A key bias shifts every score of a query alike, so softmax cancels its gradient.
    let moving: Vec<_> = names.iter().copied().filter(|name| *name != "key.bias").collect();
    let mut frozen_key_bias = biased;
    if let Projection::Dense(linear) = &mut *frozen_key_bias.key {
        linear.bias.freeze(false);
    }
    assert_module(frozen_key_bias, &x, &moving);
}

/// Large enough that a CPU computes a lone row's gate and up on two threads.
#[test]
fn a_lone_row_is_computed_as_one_of_many() {
    mlx_rs::random::seed(3).unwrap();
    let mut feed_forward = GatedFeedForward::new(512, 1024).unwrap();
    let rows = normal(2, &[2, 1, 512], Dtype::Float32);
    let together = Tensor::of(&feed_forward.forward(&rows).unwrap());
    for (row, expected) in split_rows(&rows).iter().zip(together.rows()) {
        let expected = Tensor::new(&[1, 1, 512], expected.to_vec());
        assert_close("lone row", &feed_forward.forward(row).unwrap(), &expected, Tolerance::LAYER);
    }
    let gradients = |feed_forward: &mut GatedFeedForward, x: &Array| {
        let loss = |feed_forward: &mut GatedFeedForward, x: &Array| -> Result<Array, Exception> {
            feed_forward.forward(x)?.square()?.sum(None)
        };
        nn::value_and_grad(loss)(feed_forward, x).unwrap().1
    };
    let both = gradients(&mut feed_forward, &rows);
    let [first, second] = split_rows(&rows).map(|row| gradients(&mut feed_forward, &row));
    for (name, gradient) in &both {
        let sum = Tensor::of(&first[name].add(&second[name]).unwrap());
        assert_close(&format!("gradient of {name}"), gradient, &sum, Tolerance::LAYER);
    }
}

fn split_rows(rows: &Array) -> [Array; 2] {
    mlx_rs::ops::split_equal(rows, 2, 0).unwrap().try_into().unwrap()
}

#[test]
fn an_optimizer_fits_a_block_to_a_target() {
    let (mut block, x) = (block(), input(2, 6));
    let target = normal(5, &[2, 6, DIMS], Dtype::Float32);
    let loss =
        |block: &mut DecoderBlock, (x, target): (&Array, &Array)| -> Result<Array, Exception> {
            block.forward(x)?.subtract(target)?.square()?.mean(None)
        };
    let mut value_and_grad = nn::value_and_grad(loss);
    let mut optimizer = Adam::new(1e-2);
    let mut losses = Vec::new();
    for _ in 0..40 {
        let (value, gradients) = value_and_grad(&mut block, (&x, &target)).unwrap();
        optimizer.update(&mut block, gradients).unwrap();
        losses.push(value.item_exact::<f32>());
    }
    assert!(losses[39] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn a_block_compiles() {
    let (mut block, x) = (block(), input(1, 5));
    let expected = Tensor::of(&block.forward(&x).unwrap());
    let step = |block: &mut DecoderBlock, x: &Array| block.forward(x);
    let compiled = compile_with_state(step, None)(&mut block, &x).unwrap();
    assert_close("compiled DecoderBlock", &compiled, &expected, Tolerance::LAYER);
}

/// By few rows and by many, which are multiplied in different ways.
#[test]
fn a_prepared_block_matches_the_oracle() {
    let eps = RmsNormOptions::DEFAULT_EPS.into();
    for x in [input(3, 1), input(2, 7), input(2, 65)] {
        let mut block = block();
        let weights = Weights::of(&block);
        block.prepare_for_inference().unwrap();
        let expected = per_sequence(&x, |rows| oracle::decoder_block(&weights, rows, HEADS, eps));
        assert_close("prepared", &block.forward(&x).unwrap(), &expected, Tolerance::LAYER);
    }
}

/// Blocks of everything that what is prepared goes through.
fn kinds() -> Vec<(&'static str, DecoderBlock)> {
    let around =
        |attention, feed_forward| DecoderBlock::new(DIMS, attention, feed_forward).unwrap();
    let plain = || GatedFeedForward::new(DIMS, 40).unwrap();
    let without_rope = AttentionBuilder::new(DIMS, 4).num_kv_heads(1).build().unwrap();
    let mut biased = AttentionBuilder::new(DIMS, 2).bias(true).output_bias(true).build().unwrap();
    biased.key.freeze_parameters(true);
    let wide = GatedFeedForwardBuilder::new(DIMS, 24).bias(true).build().unwrap();
    vec![
        ("rope", block()),
        ("norms and rope", around(attention_with_norms(Some(Rope::new(4).unwrap())), plain())),
        ("norms", around(attention_with_norms(None), plain())),
        ("no rope", around(without_rope, plain())),
        ("biases", around(biased, wide)),
    ]
}

fn token_by_token(block: &mut DecoderBlock, x: &Array) -> Array {
    let mut cache = SimpleKvCache::new();
    let parts = split(x, &[2, 1, 4]);
    let parts = parts.iter().map(|part| block.forward((part, &mut cache)).unwrap());
    concatenate(&parts.collect::<Vec<_>>(), 1).unwrap()
}

#[test]
fn a_prepared_block_says_what_it_said_before() {
    let x = input(2, 7);
    for (name, plain) in kinds() {
        let mut prepared = plain.clone();
        prepared.prepare_for_inference().unwrap();
        let runs: [fn(&mut DecoderBlock, &Array) -> Array; 3] = [
            |block, x| block.forward(x).unwrap(),
            token_by_token,
            |block, x| {
                let sum = |x: &Array| -> Result<Array, Exception> {
                    block.clone().forward(x)?.square()?.sum(None)
                };
                mlx_rs::transforms::grad(sum)(x).unwrap()
            },
        ];
        for (number, run) in runs.into_iter().enumerate() {
            let expected = Tensor::of(&run(&mut plain.clone(), &x));
            let what = format!("{name}, prepared, run {number}");
            assert_close(&what, &run(&mut prepared.clone(), &x), &expected, Tolerance::LAYER);
        }
        for empty in [input(0, 3), input(2, 0)] {
            assert_eq!(prepared.forward(&empty).unwrap().shape(), empty.shape(), "{name}");
        }
    }
}

#[test]
fn a_prepared_block_trains_saves_and_loads() {
    let (x, mut prepared) = (input(2, 5), block());
    prepared.prepare_for_inference().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("block.safetensors");
    let mut other = DecoderBlock::new(DIMS, attention(), GatedFeedForward::new(DIMS, 40).unwrap());
    let fresh = other.as_mut().unwrap();

    prepared.save_safetensors(&path).unwrap();
    fresh.load_safetensors(&path).unwrap();
    let expected = Tensor::of(&prepared.forward(&x).unwrap());
    assert_close("saved prepared", &fresh.forward(&x).unwrap(), &expected, Tolerance::LAYER);

    for parameter in fresh.parameters_mut().flatten().into_values() {
        *parameter = parameter.multiply(Array::from_f32(0.5)).unwrap();
    }
    fresh.save_safetensors(&path).unwrap();
    prepared.load_safetensors(&path).unwrap();
    let expected = Tensor::of(&fresh.forward(&x).unwrap());
    assert_close("loaded prepared", &prepared.forward(&x).unwrap(), &expected, Tolerance::LAYER);

    prepared.prepare_for_inference().unwrap();
    assert_module(prepared, &x, BLOCK_PARAMETERS);
}

/// Parameters that are set after a block was prepared are those that count.
#[test]
fn what_is_set_of_a_prepared_block_is_heeded() {
    let x = input(1, 3);
    let (mut prepared, mut plain) = (block(), block());
    prepared.prepare_for_inference().unwrap();
    for block in [&mut prepared, &mut plain] {
        let weight = normal(31, &[DIMS, DIMS], Dtype::Float32);
        block.attention.query = nn::Linear { weight: weight.into(), bias: Param::new(None) }.into();
        for (name, parameter) in block.feed_forward.parameters_mut().flatten() {
            if &*name == "up.weight" {
                *parameter = normal(32, &[40, DIMS], Dtype::Float32);
            }
        }
    }
    let expected = Tensor::of(&plain.forward(&x).unwrap());
    assert_close("set anew", &prepared.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

#[test]
fn quantized_projections_do_not_train() {
    let weight = normal(3, &[64, 64], Dtype::Float32);
    let packed = QuantizedWeight::quantize(&weight, 32, 8).unwrap();
    let mut attention = AttentionBuilder::new(64, 4).build().unwrap();
    attention.query = QuantizedLinear::from_weight(packed).unwrap().into();
    let names: Vec<_> = attention.trainable_parameters().flatten().into_keys().collect();
    assert!(names.iter().all(|name| !name.starts_with("query")), "{names:?}");
    let x = normal(4, &[1, 3, 64], Dtype::Float32);
    let dense = {
        let mut dense = attention.clone();
        let mut linear = nn::LinearBuilder::new(64, 64).bias(false).build().unwrap();
        linear.weight.value = weight;
        dense.query = linear.into();
        Tensor::of(&dense.forward(&x).unwrap())
    };
    let close = Tolerance { rtol: 2e-2, atol: 2e-2 };
    assert_close("8-bit queries", &attention.forward(&x).unwrap(), &dense, close);
}

#[test]
fn tied_embeddings_look_up_and_project() {
    let table = normal(1, &[10, 32], Dtype::Float32);
    let dense = TokenEmbedding::from(nn::Embedding { weight: Param::new(table.clone()) });
    let packed = QuantizedWeight::quantize(&table, 32, 8).unwrap();
    let quantized = TokenEmbedding::from(QuantizedEmbedding::from_weight(packed).unwrap());
    let ids = Array::from_slice(&[3_u32, 0, 9, 3], &[2, 2]);
    let rows = Tensor::of(&table);
    for (mut embedding, tolerance) in [
        (dense, Tolerance::of("TokenEmbedding", Dtype::Float32)),
        (quantized, Tolerance { rtol: 0.0, atol: 2e-2 }),
    ] {
        let looked_up = embedding.forward(&ids).unwrap();
        let expected =
            Tensor::from_fn(&[2, 2, 32], |at| rows.at(&[[3, 0, 9, 3][2 * at[0] + at[1]], at[2]]));
        assert_close("lookup", &looked_up, &expected, tolerance);
        let logits = embedding.as_linear(&looked_up).unwrap();
        let held = Tensor::of(
            &embedding.forward(&Array::from_slice(&(0..10).collect::<Vec<i32>>(), &[10])).unwrap(),
        );
        let x = Tensor::of(&looked_up);
        let product = Tensor::from_fn(&[2, 2, 10], |at| {
            (0..32).map(|d| x.at(&[at[0], at[1], d]) * held.at(&[at[2], d])).sum()
        });
        assert_close("as_linear", &logits, &product, Tolerance::LAYER);
        assert!(embedding.forward(&Array::from_slice(&[0.5_f32], &[1])).is_err());
        let unknown = embedding.forward(&Array::from_slice(&[-1, 10], &[2])).unwrap();
        assert!(Tensor::of(&unknown).values.iter().all(|value| value.is_nan()));
        let none = embedding.forward(&Array::from_slice::<i32>(&[], &[0, 3])).unwrap();
        assert_eq!(none.shape(), [0, 3, 32]);
    }
}

#[test]
fn an_embedding_must_be_a_table_of_tokens() {
    let refused = |weight: Array| {
        let mut embedding = TokenEmbedding::from(nn::Embedding { weight: Param::new(weight) });
        let id = Array::from_int(0);
        embedding.forward(&id).unwrap_err().what().to_owned()
    };
    assert_eq!(
        refused(normal(1, &[4], Dtype::Float32)),
        "[TokenEmbedding] weight must have shape [V, D] but got [4]"
    );
    assert!(refused(Array::from_slice(&[7, 8], &[2, 1])).contains("weight must have dtype"));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let refused = |builder: AttentionBuilder| builder.build().unwrap_err().to_string();
    assert_eq!(
        refused(AttentionBuilder::new(10, 3)),
        "[Attention] num_heads must divide 10 but got 3"
    );
    assert_eq!(
        refused(AttentionBuilder::new(12, 4).num_kv_heads(3)),
        "[Attention] num_kv_heads must divide 4 but got 3"
    );
    assert!(refused(AttentionBuilder::new(12, 0)).contains("num_heads"));
    assert!(refused(AttentionBuilder::new(12, 4).head_dim(0)).contains("head_dim"));
    assert!(refused(AttentionBuilder::new(12, 4).head_dim(i32::MAX)).contains("head_dim"));
    assert!(refused(AttentionBuilder::new(12, 4).scale(f32::NAN)).contains("scale"));
    assert_eq!(
        refused(AttentionBuilder::new(16, 4).rope(Rope::new(8).unwrap())),
        "[Attention] rope must turn at most D = 4 elements but got 8"
    );
    assert_eq!(
        refused(AttentionBuilder::new(16, 4).qk_norm(RmsNorm::new(8).unwrap())),
        "[Attention] qk_norm must have shape [4] but got [8]"
    );
    assert!(matches!(
        GatedFeedForward::new(8, 0),
        Err(Error::Value { argument: "hidden_dims", .. })
    ));
    let builder = DecoderBlockBuilder::new(0, attention(), GatedFeedForward::new(8, 8).unwrap());
    assert!(builder.build().is_err());
    let flat = attention().forward(&normal(1, &[3, DIMS], Dtype::Float32)).unwrap_err();
    assert!(flat.what().contains("[Attention] x must have shape [B, S, 16]"), "{flat}");
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() {
    let wide = normal(1, &[1, 3, DIMS + 1], Dtype::Float32);
    let error = attention().forward(&wide).unwrap_err();
    assert!(error.what().starts_with("[Attention] x must have shape [B, S, 16]"), "{error}");
    let error = GatedFeedForward::new(DIMS, 8).unwrap().forward(&wide).unwrap_err();
    assert!(error.what().starts_with("[GatedFeedForward] x must have shape [..., 16]"), "{error}");
    let mut embedding = TokenEmbedding::from(nn::Embedding::new(10, DIMS).unwrap());
    let error = embedding.as_linear(&wide).unwrap_err().to_string();
    assert!(error.starts_with("[TokenEmbedding] x must have shape [..., 16]"), "{error}");
}

#[test]
fn a_rope_of_another_layout_turns_the_same_tokens() {
    let x = input(2, 5);
    let build = |layout| {
        mlx_rs::random::seed(7).unwrap();
        let rope = RopeBuilder::new(4).layout(layout).build().unwrap();
        AttentionBuilder::new(DIMS, 4).num_kv_heads(2).rope(rope).build().unwrap()
    };
    let expected = Tensor::of(&build(Layout::Bshd).forward(&x).unwrap());
    let other = build(Layout::Bhsd).forward(&x).unwrap();
    assert_close("rope for [B, H, S, D]", &other, &expected, Tolerance::LAYER);
}

#[test]
fn activation_and_biases_of_a_feed_forward_reach_the_result() {
    let x = input(2, 3);
    for (activation, formula) in
        [(Activation::Silu, oracle::silu as fn(f64) -> f64), (Activation::Relu, |g| g.max(0.0))]
    {
        let builder = GatedFeedForwardBuilder::new(DIMS, 24).activation(activation).bias(true);
        let mut feed_forward = builder.build().unwrap();
        let weights = Weights::of(&feed_forward);
        let expected = per_sequence(&x, |rows| oracle::feed_forward(&weights, "", rows, formula));
        assert_close(
            &format!("{activation}"),
            &feed_forward.forward(&x).unwrap(),
            &expected,
            Tolerance::LAYER,
        );
    }
}

#[test]
fn the_eps_of_a_block_reaches_its_norms() {
    let x = input(1, 3);
    let builder =
        DecoderBlockBuilder::new(DIMS, attention(), GatedFeedForward::new(DIMS, 24).unwrap());
    let mut block = builder.norm_eps(0.5).build().unwrap();
    let weights = Weights::of(&block);
    let expected = per_sequence(&x, |rows| oracle::decoder_block(&weights, rows, HEADS, 0.5));
    assert_close("DecoderBlock", &block.forward(&x).unwrap(), &expected, Tolerance::LAYER);
}

#[test]
fn every_option_of_attention_reaches_the_scores() {
    let x = input(2, 6);
    for (scale, causal, head_dim) in [(Some(0.3), true, 4), (None, false, 4), (None, true, 6)] {
        mlx_rs::random::seed(9).unwrap();
        let mut attention = AttentionBuilder::new(DIMS, 4)
            .num_kv_heads(2)
            .head_dim(head_dim)
            .scale(scale)
            .causal(causal)
            .rope(Rope::new(head_dim).unwrap())
            .build()
            .unwrap();
        let size = head_dim as usize;
        let scale = scale.map_or(1.0 / f64::from(head_dim).sqrt(), f64::from);
        let heads = Heads { size, scale, causal, ..HEADS };
        let weights = Weights::of(&attention);
        let expected = per_sequence(&x, |rows| oracle::attention(&weights, "", rows, heads));
        assert_close("Attention", &attention.forward(&x).unwrap(), &expected, Tolerance::LAYER);
    }
}

#[test]
fn a_refused_call_leaves_the_cache_alone() {
    let (mut attention, mut cache) = (attention(), SimpleKvCache::new());
    let x = input(1, 3);
    attention.forward((&x, &mut cache)).unwrap();
    let other_batch = input(2, 1);
    assert!(attention.forward((&other_batch, &mut cache)).is_err());
    let (token, mask) = (input(1, 1), Array::from_slice(&[true; 3], &[3]));
    let short = AttentionInput { x: &token, mask: Some(&mask), cache: Some(&mut cache) };
    assert!(attention.forward(short).is_err(), "a mask for three of four keys");
    assert_eq!(cache.len(), 3);
    let (keys, _) = cache.contents(Layout::Bshd).unwrap().unwrap();
    assert_eq!(keys.shape(), [1, 3, 2, 4]);
}
