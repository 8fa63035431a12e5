use mlx_primitives::{
    Error, Layout,
    attention::{
        FlashAttentionOptions, FusedRopeAttention, FusedRopeAttentionBuilder,
        FusedRopeAttentionInput, FusedRopeAttentionOptions, fused_rope_attention,
    },
    cache::{Cache, SimpleKvCache},
    rope::{Rope, RopeOptions},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::Module,
    ops::{concatenate, indexing::TryIndexOp},
};

use super::{
    cases::Sizes,
    oracle::{Rule, attend},
    self_attention::assert_attention,
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "fused_rope_attention";

/// Element `i` with element `i + dims / 2`, by the position times `base^(-2i / dims)`.
fn turned(x: &Tensor, dims: usize, base: f64, starts: [i32; 2]) -> Tensor {
    let half = dims / 2;
    Tensor::from_fn(&x.shape, |at| {
        let &[b, s, h, d] = at else { panic!("rank") };
        if d >= dims {
            return x.at(at);
        }
        let position = f64::from(starts[b]) + s as f64;
        let angle = position * base.powf(-((d % half) as f64) / half as f64);
        let other = x.at(&[b, s, h, (d + half) % dims]);
        x.at(at) * angle.cos() + if d < half { -other } else { other } * angle.sin()
    })
}

fn inputs(sizes: [i32; 7]) -> [Array; 3] {
    let sizes = Sizes(sizes);
    [(1, sizes.queries()), (2, sizes.keys()), (3, sizes.values())]
        .map(|(seed, shape)| normal(seed, &shape, Dtype::Float32))
}

fn expected(inputs: &[Tensor], starts: [i32; 2], causal: bool) -> Tensor {
    let turn = |x: &Tensor| turned(x, 6, 100.0, starts);
    let scale = 1.0 / (*inputs[0].shape.last().unwrap() as f64).sqrt();
    let rule = Rule { scale, causal, ..Default::default() };
    attend(&turn(&inputs[0]), &turn(&inputs[1]), &inputs[2], rule).0
}

fn options(causal: bool, layout: Layout) -> FusedRopeAttentionOptions<'static> {
    FusedRopeAttentionOptions {
        rope: RopeOptions { dims: Some(6), base: 100.0, ..Default::default() },
        attention: FlashAttentionOptions { causal, layout, ..Default::default() },
    }
}

#[test]
fn it_turns_and_attends_as_the_oracle_does() {
    let inputs = inputs([2, 4, 2, 9, 9, 8, 5]);
    let tensors = inputs.each_ref().map(Tensor::of);
    let starts = Array::from_slice(&[3, 40], &[2]);
    for layout in [Layout::Bshd, Layout::Bhsd] {
        let swap = |array: &Array| match layout {
            Layout::Bshd => array.clone(),
            Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
        };
        let [q, k, v] = inputs.each_ref().map(swap);
        for causal in [true, false] {
            let options = || options(causal, layout);
            let close = |y: Array, starts| {
                let what = format!("{OP} in {layout:?}");
                let expected = expected(&tensors, starts, causal);
                let tolerance = Tolerance::of(OP, Dtype::Float32);
                assert_close(&what, &swap(&y), &expected, tolerance);
            };
            close(fused_rope_attention((&q, &k, &v), 7, options()).unwrap(), [7, 7]);
            close(fused_rope_attention((&q, &k, &v), &starts, options()).unwrap(), [3, 40]);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let tensors = inputs([2, 2, 1, 3, 3, 6, 4]).each_ref().map(Tensor::of);
    let oracle = |inputs: &[Tensor]| expected(inputs, [5, 5], true);
    assert_gradients(OP, &tensors, oracle, |x| {
        fused_rope_attention((&x[0], &x[1], &x[2]), 5, options(true, Layout::Bshd))
    });
}

#[test]
fn refusals_are_those_of_its_parts() {
    let [q, k, v] = inputs([1, 2, 1, 4, 4, 8, 8]);
    let short = k.try_index((.., ..3, .., ..)).unwrap();
    let call = |q: &Array, k: &Array, v: &Array| {
        fused_rope_attention((q, k, v), 0, options(true, Layout::Bshd)).unwrap_err().to_string()
    };
    assert!(call(&q, &short, &short).starts_with("[rope_qk] keys must have shape"));
    assert!(call(&q, &k, &short).starts_with("[flash_attention] values must have shape"));
    assert!(call(&q.as_dtype(Dtype::Int32).unwrap(), &k, &v).starts_with("[rope_qk] queries must"));
}

fn module() -> FusedRopeAttention {
    let rope = Rope::new(6).unwrap();
    FusedRopeAttentionBuilder::new(4, 8).num_kv_heads(2).rope(rope).build().unwrap()
}

#[test]
fn token_by_token_with_a_cache_is_the_whole_prompt_at_once() {
    let (inputs, mut module) = (inputs([2, 4, 2, 9, 9, 8, 8]), module());
    let [q, k, v] = &inputs;
    let whole = Tensor::of(&module.forward((q, k, v)).unwrap());
    for ends in [&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[4, 5, 9]] {
        let (mut cache, mut parts, mut start) = (SimpleKvCache::new(), Vec::new(), 0);
        for &end in ends {
            let part = |x: &Array| x.try_index((.., start..end, .., ..)).unwrap();
            let (q, k, v) = (part(q), part(k), part(v));
            parts.push(module.forward((&q, &k, &v, &mut cache)).unwrap());
            start = end;
        }
        let joined = concatenate(&parts, 1).unwrap();
        assert_close(&format!("up to {ends:?}"), &joined, &whole, Tolerance::LAYER);
    }
}

#[test]
fn the_module_is_the_function() {
    let [q, k, v] = inputs([2, 4, 2, 5, 5, 8, 8]).map(|x| x.swap_axes(1, 2).unwrap());
    let mask = Array::from_slice(&[true, false, true, true, true], &[5]);
    let mut module = FusedRopeAttentionBuilder::new(4, 8)
        .num_kv_heads(2)
        .causal(false)
        .scale(0.3)
        .layout(Layout::Bhsd)
        .build()
        .unwrap();
    let input = FusedRopeAttentionInput { mask: Some(&mask), ..(&q, &k, &v).into() };
    let y = module.forward(input).unwrap();
    let attention = FlashAttentionOptions {
        scale: Some(0.3),
        mask: Some(&mask),
        layout: Layout::Bhsd,
        ..Default::default()
    };
    let options = FusedRopeAttentionOptions { attention, ..Default::default() };
    let expected = Tensor::of(&fused_rope_attention((&q, &k, &v), 0, options).unwrap());
    assert_close("FusedRopeAttention", &y, &expected, Tolerance::of(OP, Dtype::Float32));
}

#[test]
fn a_refused_call_leaves_the_cache_alone() {
    let [q, k, v] = inputs([1, 4, 2, 3, 3, 8, 8]);
    let (mut module, mut cache) = (module(), SimpleKvCache::new());
    module.forward((&q, &k, &v, &mut cache)).unwrap();
    let mask = Array::from_slice(&[true; 5], &[5]);
    let mut refused = |q: &Array, k: &Array, v: &Array, mask: Option<&Array>| {
        let input = FusedRopeAttentionInput { mask, ..(q, k, v, &mut cache).into() };
        let message = module.forward(input).unwrap_err().what().to_owned();
        assert_eq!(cache.len(), 3, "{message}");
        message
    };
    let short_mask = refused(&q, &k, &v, Some(&mask));
    let expected = "[flash_attention] mask must have shape broadcastable to [1, 4, 3, 6]";
    assert!(short_mask.starts_with(expected), "{short_mask}");
    let name = "[FusedRopeAttention]";
    for (message, expected) in [
        (refused(&k, &k, &v, None), "queries must have shape [B, S, 4, 8]"),
        (refused(&q, &q, &v, None), "keys must have shape [1, 3, 2, 8]"),
        (refused(&q, &k, &q, None), "values must have shape [1, 3, 2, D_v]"),
        (refused(&q, &k.as_dtype(Dtype::Float16).unwrap(), &v, None), "keys must have dtype"),
    ] {
        assert!(message.starts_with(&format!("{name} {expected}")), "{message}");
    }
}

#[test]
fn the_module_is_part_of_one_that_trains_saves_and_composes() {
    let attention = FusedRopeAttention::new(2, 8).unwrap();
    assert_attention(attention, 9);
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let refused = |builder: FusedRopeAttentionBuilder| match builder.build() {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let of = FusedRopeAttentionBuilder::new;
    assert_eq!(refused(of(0, 8)), "num_heads");
    assert_eq!(refused(of(4, 0)), "head_dim");
    assert_eq!(refused(of(4, 7)), "dims");
    assert_eq!(refused(of(4, 8).num_kv_heads(3)), "num_heads");
    assert_eq!(refused(of(4, 8).scale(f32::NAN)), "scale");
    assert_eq!(refused(of(4, 4).rope(Rope::new(8).unwrap())), "rope");
}
