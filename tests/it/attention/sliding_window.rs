use mlx_primitives::{
    Backend, Dispatch, Error, Layout, Result,
    attention::{
        SlidingWindowAttention, SlidingWindowAttentionBuilder, SlidingWindowOptions,
        sliding_window_attention,
    },
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::Module,
    ops::indexing::TryIndexOp,
    transforms::{compile::compile, fallible_vjp},
};

use super::{cases::Sizes, self_attention::assert_attention};
use crate::support::{
    FLOATING,
    backends::{on_backends, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "sliding_window_attention";

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    sizes: Sizes,
    window_size: i32,
    causal: bool,
    scale: Option<f32>,
    strided: bool,
}

const fn case(name: &'static str, sizes: [i32; 7], window_size: i32) -> Case {
    let sizes = Sizes(sizes);
    Case { name, sizes, window_size, causal: true, scale: None, strided: false }
}

const fn both_sides(name: &'static str, sizes: [i32; 7], window_size: i32) -> Case {
    Case { causal: false, ..case(name, sizes, window_size) }
}

/// Blocks are of 64 queries on a CPU and of 128 on a GPU.
const CASES: &[Case] = &[
    case("one of everything", [1, 1, 1, 1, 1, 1, 1], 0),
    case("no batch", [0, 2, 2, 3, 3, 8, 8], 2),
    case("no queries", [1, 2, 2, 0, 3, 8, 8], 2),
    case("no keys", [1, 2, 1, 3, 0, 8, 8], 2),
    case("no value size", [1, 2, 2, 3, 3, 8, 0], 2),
    case("shorter than a block", [2, 4, 2, 9, 9, 32, 32], 3),
    case("a window of its own", [1, 2, 1, 150, 150, 16, 16], 0),
    case("a window of one", [1, 2, 1, 150, 150, 16, 8], 1),
    case("blocks of one sequence", [1, 4, 2, 210, 210, 8, 8], 40),
    case("blocks of several", [3, 2, 1, 210, 210, 8, 8], 40),
    case("whole blocks", [1, 1, 1, 384, 384, 8, 8], 128),
    case("a window as long as a block", [2, 1, 1, 260, 260, 8, 8], 64),
    case("a window longer than a block", [2, 2, 1, 410, 410, 4, 4], 150),
    case("a window of all but one", [1, 2, 2, 40, 40, 8, 8], 38),
    case("a window of all", [1, 2, 2, 40, 40, 8, 8], 39),
    case("a window of more", [1, 2, 2, 40, 40, 8, 8], i32::MAX),
    case("decode", [2, 4, 1, 1, 300, 32, 32], 20),
    case("decode within the window", [2, 4, 1, 1, 7, 32, 32], 20),
    case("cached keys", [1, 2, 1, 280, 330, 8, 8], 33),
    case("few queries, many keys", [2, 2, 1, 5, 450, 16, 16], 33),
    case("more queries than keys", [2, 2, 1, 250, 200, 8, 8], 33),
    case("all but one query hidden", [1, 4, 2, 7, 1, 32, 80], 3),
    both_sides("both sides, shorter than a block", [2, 4, 2, 9, 9, 32, 32], 3),
    both_sides("both sides, its own", [1, 2, 1, 150, 150, 16, 16], 0),
    both_sides("both sides, blocks of one sequence", [1, 2, 1, 400, 400, 8, 8], 70),
    both_sides("both sides, blocks of several", [2, 2, 1, 290, 290, 8, 8], 15),
    both_sides("both sides, a window of more", [1, 2, 2, 40, 40, 8, 8], 99),
    both_sides("both sides, cached keys", [1, 2, 1, 330, 380, 8, 8], 33),
    both_sides("both sides, more queries than keys", [1, 2, 1, 250, 200, 8, 8], 33),
    both_sides("both sides, hidden queries", [1, 2, 2, 20, 3, 16, 16], 4),
    Case { scale: Some(0.5), ..case("scale", [1, 2, 2, 150, 150, 8, 8], 9) },
    Case { scale: Some(0.0), ..case("scale 0", [1, 2, 2, 150, 150, 8, 8], 9) },
    Case { scale: Some(-0.5), ..case("negative scale", [1, 2, 2, 150, 150, 8, 8], 9) },
    Case { strided: true, ..case("strided", [2, 2, 1, 170, 170, 16, 16], 40) },
];

fn inputs(case: &Case, dtype: Dtype) -> [Array; 3] {
    let sizes = case.sizes;
    let arrays = [(1, sizes.queries()), (2, sizes.keys()), (3, sizes.values())]
        .map(|(seed, shape)| normal(seed, &shape, dtype));
    if case.strided { arrays.map(|array| strided(&array)) } else { arrays }
}

/// For each query, one loop over the keys of its window.
fn expected(case: &Case, inputs: &[Tensor]) -> Tensor {
    let Sizes([.., query_length, key_length, size, value_size]) = case.sizes;
    let scale = case.scale.map_or(1.0 / f64::from(size).sqrt(), f64::from);
    let (query_length, key_length) = (i64::from(query_length), i64::from(key_length));
    let window_size = i64::from(case.window_size);
    let [queries, keys, values] = [0, 1, 2].map(|which| Heads(&inputs[which]));
    let mut result = Vec::new();
    for (b, i, h) in case.sizes.rows() {
        let own = i as i64 + key_length - query_length;
        let last = if case.causal { own } else { own + window_size };
        let seen = (own - window_size).max(0)..(last + 1).min(key_length);
        let kv_head = case.sizes.kv_head(h);
        let query = queries.at(b, i, h);
        let score = |j: &i64| {
            let key = keys.at(b, *j as usize, kv_head);
            scale * query.iter().zip(key).map(|(x, y)| x * y).sum::<f64>()
        };
        let scores: Vec<_> = seen.clone().map(|j| score(&j)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<_> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = powers.iter().sum();
        let mut average = vec![0.0; value_size as usize];
        for (j, power) in seen.zip(powers) {
            for (sum, value) in average.iter_mut().zip(values.at(b, j as usize, kv_head)) {
                *sum += power / total * value;
            }
        }
        result.extend(average);
    }
    Tensor::new(&case.sizes.result().map(|size| size as usize), result)
}

/// `[B, S, H, D]`.
struct Heads<'a>(&'a Tensor);

impl Heads<'_> {
    fn at(&self, b: usize, s: usize, h: usize) -> &[f64] {
        let &[_, length, heads, size] = &self.0.shape[..] else { panic!("rank") };
        let start = ((b * length + s) * heads + h) * size;
        &self.0.values[start..start + size]
    }
}

/// Runs in `layout` on `[B, S, H, D]` arrays, and answers in that order.
fn run_in(inputs: &[Array], window_size: i32, options: SlidingWindowOptions) -> Result<Array> {
    let swap = |array: &Array| match options.layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    };
    let [queries, keys, values] = [0, 1, 2].map(|index| swap(&inputs[index]));
    Ok(swap(&sliding_window_attention(queries, keys, values, window_size, options.clone())?))
}

fn options(case: &Case, layout: Layout) -> SlidingWindowOptions {
    let &Case { scale, causal, .. } = case;
    SlidingWindowOptions { scale, causal, layout, ..Default::default() }
}

fn check_case(case: &Case, dtype: Dtype, with_kernel: [bool; 2]) {
    let inputs = inputs(case, dtype);
    let expected = expected(case, &inputs.each_ref().map(Tensor::of));
    for (layout, with_kernel) in [Layout::Bshd, Layout::Bhsd].into_iter().zip(with_kernel) {
        on_backends(
            with_kernels(with_kernel),
            OP,
            |dispatch| {
                let options = SlidingWindowOptions { dispatch, ..options(case, layout) };
                run_in(&inputs, case.window_size, options)
            },
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
    for (turn, case) in CASES.iter().enumerate() {
        for (i, dtype) in FLOATING.into_iter().enumerate() {
            check_case(case, dtype, [0, 3].map(|layout| turn % 6 == layout + i));
        }
    }
}

fn check_gradients(case: &Case) {
    let tensors = inputs(case, Dtype::Float32).each_ref().map(Tensor::of);
    let oracle = |inputs: &[Tensor]| expected(case, inputs);
    gradients_on_each_backend(OP, &tensors, oracle, |arrays, dispatch| {
        let options = SlidingWindowOptions { dispatch, ..options(case, Layout::Bshd) };
        run_in(arrays, case.window_size, options)
    });
}

#[test]
fn gradients_match_finite_differences() {
    check_gradients(&case("in blocks", [1, 1, 1, 140, 140, 1, 1], 5));
    check_gradients(&both_sides("in blocks", [1, 1, 1, 140, 140, 1, 1], 5));
    check_gradients(&case("in a head and a tail", [2, 4, 2, 6, 7, 3, 2], 2));
    check_gradients(&both_sides("hidden rows", [1, 2, 1, 8, 3, 3, 3], 2));
}

/// At sizes for which finite differences take too long.
#[test]
fn gradients_of_blocks_are_those_of_the_reference() {
    for case in [
        case("copied", [3, 4, 2, 300, 300, 8, 8], 40),
        case("one by one", [3, 4, 2, 400, 500, 8, 16], 150),
        both_sides("one by one, both sides", [2, 2, 2, 500, 450, 8, 8], 70),
    ] {
        let inputs = inputs(&case, Dtype::Float32);
        let cotangent = normal(4, &case.sizes.result(), Dtype::Float32);
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let gradients = |backend| {
                let options = SlidingWindowOptions {
                    dispatch: Dispatch::Only(backend),
                    ..options(&case, layout)
                };
                let run = |x: &[Array]| Ok(vec![run_in(x, case.window_size, options.clone())?]);
                fallible_vjp(run, &inputs, std::slice::from_ref(&cotangent)).unwrap().1
            };
            let expected = gradients(Backend::Reference);
            for (which, gradient) in gradients(Backend::Builtin).iter().enumerate() {
                let what = format!("{} {layout:?}: gradient of input {which}", case.name);
                assert_close(&what, gradient, &Tensor::of(&expected[which]), Tolerance::GRADIENT);
            }
        }
    }
}

/// All scores of the sequence would be 256 GiB; the last rows are those of a short one.
#[test]
fn neither_way_holds_all_scores() {
    let case = case("long", [1, 1, 1, 1 << 18, 1 << 18, 4, 4], 8);
    let inputs = inputs(&case, Dtype::Float32);
    let last = |array: &Array, rows: i32| array.try_index((.., -rows.., .., ..)).unwrap();
    let run = |x: &[Array]| -> Result<Vec<Array>, Exception> {
        let options = SlidingWindowOptions {
            dispatch: Dispatch::Only(Backend::Builtin),
            ..options(&case, Layout::Bshd)
        };
        Ok(vec![run_in(x, case.window_size, options)?])
    };
    let gradients = |inputs: &[Array]| {
        let y = run(inputs).unwrap().remove(0);
        let (_, gradients) = fallible_vjp(run, inputs, &[y]).unwrap();
        last(&gradients[0], 10)
    };
    let short = gradients(&inputs.each_ref().map(|array| last(array, 30)));
    let long = gradients(&inputs);
    assert_close("of a long sequence", &long, &Tensor::of(&short), Tolerance::GRADIENT);
}

#[test]
fn it_compiles() {
    let case = case("compiled", [1, 4, 2, 300, 300, 16, 16], 40);
    let inputs = inputs(&case, Dtype::Float32);
    let attend = move |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        Ok(vec![run_in(inputs, case.window_size, options(&case, Layout::Bshd))?])
    };
    let compiled = compile(attend, None)(&inputs).unwrap();
    let expected = Tensor::of(&attend(&inputs).unwrap()[0]);
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("compiled sliding_window_attention", &compiled[0], &expected, tolerance);
}

#[test]
fn bad_arguments_are_errors_that_name_them() {
    let zeros = |shape: &[i32]| Array::zeros::<f32>(shape).unwrap();
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let call = |queries: &Array, keys: &Array, values: &Array, window_size, scale| {
        let options = SlidingWindowOptions { scale, ..Default::default() };
        let result = sliding_window_attention(queries, keys, values, window_size, options);
        result.unwrap_err().to_string()
    };
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let ints = q.as_dtype(Dtype::Int32).unwrap();
    for (message, expected) in [
        (call(&zeros(&[5, 4, 8]), &k, &k, 1, None), "queries must have shape [B, S_q, H, D]"),
        (call(&zeros(&[2, 5, 4, 0]), &k, &k, 1, None), "queries must have shape [..., D] with"),
        (call(&zeros(&[2, 5, 3, 8]), &k, &k, 1, None), "queries must have a multiple of H_kv = 2"),
        (call(&q, &zeros(&[2, 7, 2, 9]), &k, 1, None), "keys must have shape [2, S_kv, H_kv, 8]"),
        (call(&q, &k, &zeros(&[2, 6, 2, 8]), 1, None), "values must have shape [2, 7, 2, D_v]"),
        (call(&ints, &k, &k, 1, None), "queries must have dtype"),
        (call(&q, &half, &k, 1, None), "keys must have dtype Float32 but got Float16"),
        (call(&q, &k, &half, 1, None), "values must have dtype Float32 but got Float16"),
        (call(&q, &k, &k, -1, None), "window_size must be at least 0 but got -1"),
        (call(&q, &k, &k, 1, Some(f32::NAN)), "scale must be finite but got NaN"),
    ] {
        assert!(message.starts_with(&format!("[{OP}] {expected}")), "{message}");
    }
}

#[test]
fn the_module_is_part_of_one_that_trains_saves_and_composes() {
    let attention = SlidingWindowAttention::new(2, 8, 3).unwrap();
    assert_attention(attention, 9);
}

#[test]
fn the_module_is_the_function() {
    let case = Case { scale: Some(0.3), ..both_sides("module", [1, 4, 2, 12, 15, 8, 3], 4) };
    let inputs = inputs(&case, Dtype::Float32);
    let [queries, keys, values] = inputs.each_ref().map(|array| array.swap_axes(1, 2).unwrap());
    let mut module = SlidingWindowAttentionBuilder::new(4, 8, 4)
        .num_kv_heads(2)
        .causal(false)
        .scale(0.3)
        .layout(Layout::Bhsd)
        .build()
        .unwrap();
    let y = module.forward((&queries, &keys, &values)).unwrap().swap_axes(1, 2).unwrap();
    let expected = expected(&case, &inputs.each_ref().map(Tensor::of));
    assert_close("SlidingWindowAttention", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    assert_eq!(
        module.forward((&keys, &keys, &values)).unwrap_err().what(),
        "[SlidingWindowAttention] queries must have shape [B, 4, S_q, 8] but got [1, 2, 15, 8]"
    );
    assert_eq!(
        module.forward((&queries, &queries, &values)).unwrap_err().what(),
        "[SlidingWindowAttention] keys must have shape [B, 2, S_kv, 8] but got [1, 4, 12, 8]"
    );
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let refused = |builder: SlidingWindowAttentionBuilder| match builder.build() {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let of = SlidingWindowAttentionBuilder::new;
    assert_eq!(refused(of(0, 8, 1)), "num_heads");
    assert_eq!(refused(of(4, 0, 1)), "head_dim");
    assert_eq!(refused(of(4, 8, -1)), "window_size");
    assert_eq!(refused(of(4, 8, 1).num_kv_heads(3)), "num_heads");
    assert_eq!(refused(of(4, 8, 1).scale(f32::NAN)), "scale");
}
