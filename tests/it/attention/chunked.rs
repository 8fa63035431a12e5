use mlx_primitives::{
    Backend, Dispatch, Error, Layout, Result,
    attention::{
        ChunkedCrossAttention, ChunkedCrossAttentionBuilder, ChunkedCrossAttentionOptions,
        chunked_cross_attention,
    },
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::Module,
    transforms::{compile::compile, fallible_vjp},
};

use super::{
    cases::Sizes,
    oracle::{Mask, Rule, attend},
    self_attention::assert_attention,
};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "chunked_cross_attention";

type Options = ChunkedCrossAttentionOptions;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    sizes: Sizes,
    chunk_size: i32,
    scale: Option<f32>,
    causal: bool,
    query_offset: Option<i32>,
    strided: bool,
}

const fn case(name: &'static str, sizes: [i32; 7], chunk_size: i32) -> Case {
    let sizes = Sizes(sizes);
    Case { name, sizes, chunk_size, scale: None, causal: false, query_offset: None, strided: false }
}

const fn causal(name: &'static str, sizes: [i32; 7], chunk_size: i32) -> Case {
    Case { causal: true, ..case(name, sizes, chunk_size) }
}

const fn offset(name: &'static str, chunk_size: i32, query_offset: i32) -> Case {
    let query_offset = Some(query_offset);
    Case { query_offset, ..causal(name, [2, 4, 2, 7, 23, 16, 16], chunk_size) }
}

const CASES: &[Case] = &[
    case("one of everything", [1, 1, 1, 1, 1, 1, 1], 1),
    case("no batch", [0, 2, 2, 3, 3, 8, 8], 2),
    case("no queries", [1, 2, 2, 0, 3, 8, 8], 2),
    case("no keys", [1, 2, 1, 3, 0, 8, 8], 2),
    case("no value size", [1, 2, 2, 3, 3, 8, 0], 2),
    case("equal chunks", [2, 4, 2, 5, 24, 32, 32], 8),
    case("a short last chunk", [2, 4, 2, 5, 25, 32, 16], 8),
    case("one key at a time", [1, 2, 1, 5, 9, 32, 32], 1),
    case("one chunk", [1, 2, 1, 5, 9, 32, 32], 9),
    case("chunks of more", [1, 2, 1, 5, 9, 32, 32], i32::MAX),
    case("a single query", [2, 8, 1, 1, 65, 64, 64], 16),
    Case { scale: Some(-0.5), ..case("negative scale", [1, 2, 2, 7, 8, 8, 8], 3) },
    Case { scale: Some(0.0), ..case("scale 0", [1, 2, 2, 7, 8, 8, 8], 3) },
    Case { strided: true, ..case("strided", [2, 4, 2, 7, 19, 64, 64], 8) },
    causal("causal square", [2, 4, 2, 17, 17, 32, 32], 5),
    causal("causal, cached keys", [1, 4, 1, 8, 65, 32, 32], 16),
    causal("causal, hidden queries", [1, 4, 2, 19, 7, 32, 32], 3),
    causal("causal decode", [2, 4, 4, 1, 9, 64, 64], 4),
    offset("beside the first key", 5, 0),
    offset("before the keys", 5, -3),
    offset("within", 5, 9),
    offset("all visible", 5, 22),
    offset("far after", 5, i32::MAX),
    offset("nothing visible", 5, -7),
    offset("far before", 5, i32::MIN),
];

fn inputs(case: &Case, dtype: Dtype) -> [Array; 3] {
    let sizes = case.sizes;
    let arrays = [(1, sizes.queries()), (2, sizes.keys()), (3, sizes.values())]
        .map(|(seed, shape)| normal(seed, &shape, dtype));
    if case.strided { arrays.map(|array| strided(&array)) } else { arrays }
}

fn expected(case: &Case, inputs: &[Tensor]) -> Tensor {
    let Sizes([.., query_length, key_length, size, _]) = case.sizes;
    let offset = i64::from(case.query_offset.unwrap_or(key_length - query_length));
    let visible = Tensor::from_fn(&[query_length as usize, key_length as usize], |index| {
        f64::from(!case.causal || index[1] as i64 <= index[0] as i64 + offset)
    });
    let scale = case.scale.map_or(1.0 / f64::from(size).sqrt(), f64::from);
    let rule = Rule { scale, mask: Mask::Boolean(&visible), ..Default::default() };
    attend(&inputs[0], &inputs[1], &inputs[2], rule).0
}

fn options(case: &Case, layout: Layout) -> Options {
    let &Case { chunk_size, scale, causal, query_offset, .. } = case;
    Options { chunk_size, scale, causal, query_offset, layout, ..Default::default() }
}

/// Runs in the layout of the options on `[B, S, H, D]` arrays, and answers in that order.
fn run_in(inputs: &[Array], options: Options) -> Result<Array> {
    let swap = |array: &Array| match options.layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    };
    let [queries, keys, values] = [0, 1, 2].map(|index| swap(&inputs[index]));
    Ok(swap(&chunked_cross_attention(queries, keys, values, options.clone())?))
}

fn check_case(case: &Case, dtype: Dtype) {
    let inputs = inputs(case, dtype);
    let expected = expected(case, &inputs.each_ref().map(Tensor::of));
    for layout in [Layout::Bshd, Layout::Bhsd] {
        on_each_backend(
            OP,
            |dispatch| run_in(&inputs, Options { dispatch, ..options(case, layout) }),
            |backend, y| {
                assert_eq!(y.dtype(), dtype, "{}", case.name);
                let what = format!("{OP} {} {dtype:?} {layout:?} on {backend}", case.name);
                assert_close(&what, &y, &expected, Tolerance::on(OP, backend, dtype));
                for (got, expected) in Tensor::of(&y).values.iter().zip(&expected.values) {
                    assert!(*expected != 0.0 || *got == 0.0, "{what}: a hidden row holds {got}");
                }
            },
        );
    }
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for dtype in FLOATING {
            check_case(case, dtype);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for case in [
        case("chunks", [2, 4, 2, 3, 7, 4, 3], 3),
        causal("causal", [1, 2, 1, 5, 7, 4, 4], 2),
        causal("hidden rows", [1, 2, 1, 6, 4, 4, 4], 2),
        Case { query_offset: Some(1), ..causal("unseen keys", [1, 2, 1, 3, 9, 4, 4], 2) },
        Case { query_offset: Some(-9), ..causal("nothing seen", [1, 2, 1, 3, 4, 4, 4], 2) },
    ] {
        let tensors = inputs(&case, Dtype::Float32).each_ref().map(Tensor::of);
        let oracle = |inputs: &[Tensor]| expected(&case, inputs);
        gradients_on_each_backend(OP, &tensors, oracle, |arrays, dispatch| {
            run_in(arrays, Options { dispatch, ..options(&case, Layout::Bshd) })
        });
    }
}

/// The gradient of a gradient is that of the forward pass, not of the backward one.
#[test]
fn gradients_of_gradients_are_those_of_the_reference() {
    let case = causal("twice", [1, 2, 1, 4, 7, 4, 4], 3);
    let inputs = inputs(&case, Dtype::Float32);
    let twice = |backend| {
        let options = Options { dispatch: Dispatch::Only(backend), ..options(&case, Layout::Bshd) };
        let once = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
            let run = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
                Ok(vec![run_in(inputs, options.clone())?.square()?.sum(None)?])
            };
            Ok(fallible_vjp(run, inputs, &[Array::from_f32(1.0)])?.1)
        };
        fallible_vjp(once, &inputs, &inputs).unwrap().1
    };
    for (got, expected) in twice(Backend::Builtin).iter().zip(twice(Backend::Reference)) {
        assert_close("twice", got, &Tensor::of(&expected), Tolerance::GRADIENT);
    }
}

#[test]
fn it_compiles() {
    let case = causal("compiled", [1, 4, 2, 9, 30, 16, 16], 8);
    let inputs = inputs(&case, Dtype::Float32);
    let attend = move |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        Ok(vec![run_in(inputs, options(&case, Layout::Bshd))?])
    };
    let compiled = compile(attend, None)(&inputs).unwrap();
    let expected = Tensor::of(&attend(&inputs).unwrap()[0]);
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("compiled chunked_cross_attention", &compiled[0], &expected, tolerance);
}

#[test]
fn bad_arguments_are_errors_that_name_them() {
    let zeros = |shape: &[i32]| Array::zeros::<f32>(shape).unwrap();
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let call = |queries: &Array, keys: &Array, values: &Array, options: Options| {
        chunked_cross_attention(queries, keys, values, options).unwrap_err().to_string()
    };
    let none = Options::default;
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let ints = q.as_dtype(Dtype::Int32).unwrap();
    for (message, expected) in [
        (call(&zeros(&[5, 4, 8]), &k, &k, none()), "queries must have shape [B, S_q, H, D]"),
        (call(&zeros(&[2, 5, 4, 0]), &k, &k, none()), "queries must have shape [..., D] with"),
        (call(&zeros(&[2, 5, 3, 8]), &k, &k, none()), "queries must have a multiple of H_kv = 2"),
        (call(&q, &zeros(&[2, 7, 2, 9]), &k, none()), "keys must have shape [2, S_kv, H_kv, 8]"),
        (call(&q, &k, &zeros(&[2, 6, 2, 8]), none()), "values must have shape [2, 7, 2, D_v]"),
        (call(&ints, &k, &k, none()), "queries must have dtype"),
        (call(&q, &half, &k, none()), "keys must have dtype Float32 but got Float16"),
        (call(&q, &k, &half, none()), "values must have dtype Float32 but got Float16"),
        (
            call(&q, &k, &k, Options { chunk_size: 0, ..none() }),
            "chunk_size must be at least 1 but got 0",
        ),
        (
            call(&q, &k, &k, Options { scale: Some(f32::NAN), ..none() }),
            "scale must be finite but got NaN",
        ),
    ] {
        assert!(message.starts_with(&format!("[{OP}] {expected}")), "{message}");
    }
}

#[test]
fn the_module_is_part_of_one_that_trains_saves_and_composes() {
    let attention = ChunkedCrossAttentionBuilder::new(2, 8).chunk_size(4).build().unwrap();
    assert_attention(attention, 9);
}

#[test]
fn the_module_is_the_function() {
    let case = Case { scale: Some(0.3), ..causal("module", [1, 4, 2, 12, 15, 8, 3], 4) };
    let inputs = inputs(&case, Dtype::Float32);
    let [queries, keys, values] = inputs.each_ref().map(|array| array.swap_axes(1, 2).unwrap());
    let mut module = ChunkedCrossAttentionBuilder::new(4, 8)
        .chunk_size(4)
        .num_kv_heads(2)
        .causal(true)
        .scale(0.3)
        .layout(Layout::Bhsd)
        .build()
        .unwrap();
    let y = module.forward((&queries, &keys, &values)).unwrap().swap_axes(1, 2).unwrap();
    let expected = expected(&case, &inputs.each_ref().map(Tensor::of));
    assert_close("ChunkedCrossAttention", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    assert_eq!(
        module.forward((&keys, &keys, &values)).unwrap_err().what(),
        "[ChunkedCrossAttention] queries must have shape [B, 4, S_q, 8] but got [1, 2, 15, 8]"
    );
    assert_eq!(
        module.forward((&queries, &queries, &values)).unwrap_err().what(),
        "[ChunkedCrossAttention] keys must have shape [B, 2, S_kv, 8] but got [1, 4, 12, 8]"
    );
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let refused = |builder: ChunkedCrossAttentionBuilder| match builder.build() {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let of = ChunkedCrossAttentionBuilder::new;
    assert_eq!(refused(of(0, 8)), "num_heads");
    assert_eq!(refused(of(4, 0)), "head_dim");
    assert_eq!(refused(of(4, 8).chunk_size(0)), "chunk_size");
    assert_eq!(refused(of(4, 8).num_kv_heads(3)), "num_heads");
    assert_eq!(refused(of(4, 8).scale(f32::NAN)), "scale");
    assert!(ChunkedCrossAttention::new(4, 0).is_err());
}
