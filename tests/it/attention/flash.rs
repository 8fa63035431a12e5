use mlx_primitives::{
    Backend, Error, Layout, Result,
    attention::{
        FlashAttention, FlashAttentionBuilder, FlashAttentionInput, FlashAttentionOptions,
        flash_attention,
    },
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param},
    ops::{concatenate, full_like, indexing::TryIndexOp},
    transforms::compile::compile,
};

use super::{
    cases::{CASES, Case, MaskOf, Sizes, additive, boolean, third_row},
    oracle::{Mask, Rule, attend},
};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    modules::assert_module,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "flash_attention";

type Options<'a> = FlashAttentionOptions<'a>;

/// The same values as the middle of a longer buffer whose other slots are unwritten.
fn in_cache(array: &Array) -> Array {
    let unwritten = full_like(array, Array::from_f32(f32::NAN), array.dtype()).unwrap();
    let buffer = concatenate(&[&unwritten, array, &unwritten], 1).unwrap();
    buffer.eval().unwrap();
    let length = array.shape()[1];
    buffer.try_index((.., length..2 * length, .., ..)).unwrap()
}

fn inputs(case: &Case, dtype: Dtype) -> [Array; 3] {
    let sizes = case.sizes;
    let queries = normal(1, &sizes.queries(), dtype);
    let keys = normal(2, &sizes.keys(), dtype);
    let values = normal(3, &sizes.values(), dtype);
    match case.strided {
        true => [strided(&queries), in_cache(&keys), in_cache(&values)],
        false => [queries, keys, values],
    }
}

fn scale_of(case: &Case) -> f64 {
    let Sizes([.., size, _]) = case.sizes;
    case.scale.map_or(1.0 / f64::from(size).sqrt(), f64::from)
}

/// As the operation reads it: an additive mask has the dtype of the queries.
fn expected(case: &Case, [queries, keys, values]: &[Array; 3], mask: Option<&Array>) -> Tensor {
    let mask = mask.map(|mask| match mask.dtype() {
        Dtype::Bool => (true, Tensor::of(mask)),
        _ => (false, Tensor::of(&mask.as_dtype(queries.dtype()).unwrap())),
    });
    let mask = match &mask {
        None => Mask::None,
        Some((true, mask)) => Mask::Boolean(mask),
        Some((false, mask)) => Mask::Additive(mask),
    };
    let rule = Rule { scale: scale_of(case), causal: case.causal, mask };
    attend(&Tensor::of(queries), &Tensor::of(keys), &Tensor::of(values), rule)
}

/// Runs in `layout` on `[B, S, H, D]` arrays, and answers in that order.
fn run_in(layout: Layout, inputs: &[Array; 3], options: Options) -> Result<Array> {
    let swap = |array: &Array| match layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    };
    let [queries, keys, values] = inputs.each_ref().map(swap);
    let result = flash_attention(queries, keys, values, Options { layout, ..options })?;
    Ok(swap(&result))
}

/// Hidden rows are exactly zero; nothing else in the cases is.
fn assert_exact_zeros(what: &str, got: &Array, expected: &Tensor) {
    for (got, expected) in Tensor::of(got).values.iter().zip(&expected.values) {
        assert!(*expected != 0.0 || *got == 0.0, "{what}: a hidden row holds {got}");
    }
}

/// The wider entries are for MLX's op; the reference computes in f32.
fn tolerance(backend: Backend, dtype: Dtype) -> Tolerance {
    let op = if backend == Backend::Reference { "reference" } else { OP };
    Tolerance::of(op, dtype)
}

fn check_case(case: &Case, dtype: Dtype) {
    let inputs = inputs(case, dtype);
    let mask = case.mask.map(MaskOf::array);
    let expected = expected(case, &inputs, mask.as_ref());
    for layout in [Layout::Bshd, Layout::Bhsd] {
        let options = |dispatch| Options {
            scale: case.scale,
            causal: case.causal,
            mask: mask.as_ref(),
            dispatch,
            ..Default::default()
        };
        on_each_backend(
            OP,
            |dispatch| run_in(layout, &inputs, options(dispatch)),
            |backend, y| {
                assert_eq!(y.dtype(), dtype, "{}", case.name);
                let what = format!("{OP} {} {dtype:?} {layout:?} on {backend}", case.name);
                assert_close(&what, &y, &expected, tolerance(backend, dtype));
                assert_exact_zeros(&what, &y, &expected);
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
fn a_half_precision_mask_serves_f32_queries() {
    let case = Case { sizes: Sizes([1, 2, 2, 5, 7, 32, 32]), ..CASES[0] };
    let inputs = inputs(&case, Dtype::Float32);
    let mask = additive(&[5, 7], -1e38, third_row).array().as_dtype(Dtype::Float16).unwrap();
    let expected = expected(&case, &inputs, Some(&mask));
    on_each_backend(
        OP,
        |dispatch| {
            let options = Options { mask: Some(&mask), dispatch, ..Default::default() };
            run_in(Layout::Bshd, &inputs, options)
        },
        |backend, y| {
            assert_eq!(y.dtype(), Dtype::Float32);
            let what = format!("{OP} with an f16 mask on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
            assert_exact_zeros(&what, &y, &expected);
        },
    );
}

#[test]
fn a_mask_of_nan_is_not_hidden() {
    let x = normal(1, &[1, 2, 1, 8], Dtype::Float32);
    let mask = Array::from_f32(f32::NAN);
    on_each_backend(
        OP,
        |dispatch| {
            let options = Options { mask: Some(&mask), dispatch, ..Default::default() };
            flash_attention(&x, &x, &x, options)
        },
        |backend, y| assert!(Tensor::of(&y).values.iter().all(|v| v.is_nan()), "{backend}"),
    );
}

/// Checks gradients of queries, keys and values, and of the mask if it is additive.
fn check_gradients(sizes: [i32; 7], causal: bool, mask: Option<MaskOf>) {
    let case = Case { sizes: Sizes(sizes), causal, mask, ..CASES[0] };
    let mut tensors: Vec<_> = inputs(&case, Dtype::Float32).iter().map(Tensor::of).collect();
    let mask = mask.map(|mask| mask.array());
    let fixed = mask.as_ref().filter(|mask| mask.dtype() == Dtype::Bool);
    let fixed_tensor = fixed.map(Tensor::of);
    if let (Some(mask), None) = (&mask, fixed) {
        tensors.push(Tensor::of(mask));
    }
    let oracle = |inputs: &[Tensor]| {
        let mask = match (&fixed_tensor, inputs.get(3)) {
            (Some(mask), _) => Mask::Boolean(mask),
            (None, Some(mask)) => Mask::Additive(mask),
            (None, None) => Mask::None,
        };
        attend(&inputs[0], &inputs[1], &inputs[2], Rule { scale: scale_of(&case), causal, mask })
    };
    gradients_on_each_backend(OP, &tensors, oracle, |arrays, dispatch| {
        let mask = fixed.or(arrays.get(3));
        let options = Options { causal, mask, dispatch, ..Default::default() };
        flash_attention(&arrays[0], &arrays[1], &arrays[2], options)
    });
}

#[test]
fn gradients_match_finite_differences() {
    check_gradients([2, 2, 2, 3, 4, 5, 3], false, None);
    check_gradients([1, 4, 2, 3, 4, 5, 5], false, None);
    check_gradients([1, 3, 1, 4, 4, 5, 5], true, None);
}

#[test]
fn gradients_pass_by_hidden_rows() {
    check_gradients([1, 2, 1, 5, 3, 4, 4], true, None);
    check_gradients([1, 4, 2, 4, 5, 4, 4], false, Some(boolean(&[1, 1, 4, 5], third_row)));
    check_gradients([1, 4, 2, 4, 5, 4, 4], true, Some(boolean(&[1, 1, 4, 5], third_row)));
}

#[test]
fn gradients_reach_an_additive_mask() {
    let hidden = f32::NEG_INFINITY;
    check_gradients([2, 2, 1, 3, 5, 4, 4], false, Some(additive(&[2, 1, 1, 5], hidden, |_| false)));
    check_gradients([1, 4, 2, 4, 5, 4, 4], false, Some(additive(&[4, 5], hidden, third_row)));
    check_gradients([1, 2, 2, 5, 4, 4, 4], true, Some(additive(&[2, 5, 4], -1e38, third_row)));
}

#[test]
fn it_compiles() {
    let attend = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        let options = Options { causal: true, mask: inputs.get(3), ..Default::default() };
        Ok(vec![flash_attention(&inputs[0], &inputs[1], &inputs[2], options)?])
    };
    let case = Case { sizes: Sizes([1, 4, 2, 9, 7, 32, 32]), ..CASES[0] };
    let mut inputs = inputs(&case, Dtype::Float32).to_vec();
    inputs.push(boolean(&[9, 7], third_row).array());
    let compiled = compile(attend, None)(&inputs).unwrap();
    let expected = Tensor::of(&attend(&inputs).unwrap()[0]);
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("compiled flash_attention", &compiled[0], &expected, tolerance);
}

fn zeros(shape: &[i32]) -> Array {
    Array::zeros::<f32>(shape).unwrap()
}

#[test]
fn shapes_that_disagree_are_errors_that_name_the_argument() {
    let call = |queries: &[i32], keys: &[i32], values: &[i32]| {
        let [queries, keys, values] = [queries, keys, values].map(zeros);
        flash_attention(queries, keys, values, Options::default()).unwrap_err().to_string()
    };
    let (q, k) = ([2, 5, 4, 8], [2, 7, 2, 8]);
    assert_eq!(
        call(&[5, 4, 8], &k, &k),
        "[flash_attention] queries must have shape [B, S_q, H, D] but got [5, 4, 8]"
    );
    assert_eq!(
        call(&[2, 5, 4, 0], &k, &k),
        "[flash_attention] queries must have shape [..., D] with D at least 1 but got [2, 5, 4, 0]"
    );
    let keys_of = "[flash_attention] keys must have shape [2, S_kv, H_kv, 8] but got";
    assert_eq!(call(&q, &[7, 2, 8], &k), format!("{keys_of} [7, 2, 8]"));
    assert_eq!(call(&q, &[3, 7, 2, 8], &k), format!("{keys_of} [3, 7, 2, 8]"));
    assert_eq!(call(&q, &[2, 7, 2, 9], &k), format!("{keys_of} [2, 7, 2, 9]"));
    let values_of = "[flash_attention] values must have shape [2, 7, 2, D_v] but got";
    for values in [[1, 7, 2, 8], [2, 6, 2, 8], [2, 7, 4, 8]] {
        assert_eq!(call(&q, &k, &values), format!("{values_of} {values:?}"));
    }
    for kv_heads in [3, 8, 0] {
        assert_eq!(
            call(&q, &[2, 7, kv_heads, 8], &[2, 7, kv_heads, 8]),
            format!(
                "[flash_attention] queries must have a multiple of H_kv = {kv_heads} heads but got 4"
            )
        );
    }
}

#[test]
fn shapes_are_spelled_in_the_layout() {
    let options = Options { layout: Layout::Bhsd, ..Default::default() };
    let (queries, keys) = (zeros(&[2, 4, 5, 8]), zeros(&[2, 2, 7, 9]));
    assert_eq!(
        flash_attention(&queries, &keys, &keys, options).unwrap_err().to_string(),
        "[flash_attention] keys must have shape [2, H_kv, S_kv, 8] but got [2, 2, 7, 9]"
    );
}

#[test]
fn bad_dtypes_masks_and_scales_are_errors_that_name_the_argument() {
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let ints = q.as_dtype(Dtype::Int32).unwrap();
    let call = |queries: &Array, keys: &Array, values: &Array, options: Options| {
        flash_attention(queries, keys, values, options).unwrap_err().to_string()
    };
    let none = Options::default;
    assert!(call(&ints, &k, &k, none()).starts_with("[flash_attention] queries must have dtype"));
    let half_keys = "[flash_attention] keys must have dtype Float32 but got Float16";
    assert_eq!(call(&q, &half, &k, none()), half_keys);
    let half_values = "[flash_attention] values must have dtype Float32 but got Float16";
    assert_eq!(call(&q, &k, &half, none()), half_values);

    let with_mask = |mask: &Array| call(&q, &k, &k, Options { mask: Some(mask), ..none() });
    assert_eq!(
        with_mask(&Array::from_int(1)),
        "[flash_attention] mask must have dtype Bool or Float32 or Float16 or Bfloat16 but got Int32"
    );
    for shape in [&[5, 6][..], &[7, 5], &[2, 1, 7], &[1, 2, 4, 5, 7]] {
        assert_eq!(
            with_mask(&zeros(shape)),
            format!(
                "[flash_attention] mask must have shape broadcastable to [2, 4, 5, 7] but got {shape:?}"
            )
        );
    }
    for scale in [f32::NAN, f32::INFINITY] {
        assert_eq!(
            call(&q, &k, &k, Options { scale: Some(scale), ..none() }),
            format!("[flash_attention] scale must be finite but got {scale}")
        );
    }
}

/// Attends from `[B, S, H, D]` to itself after one trainable factor.
#[derive(Debug, Clone, ModuleParameters)]
struct SelfAttention {
    #[param]
    weight: Param<Array>,
    #[param]
    attention: FlashAttention,
}

impl Module<&Array> for SelfAttention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let x = x.multiply(&*self.weight)?;
        self.attention.forward((&x, &x, &x))
    }

    fn training_mode(&mut self, _: bool) {}
}

#[test]
fn the_module_is_part_of_one_that_trains_saves_and_composes() {
    let attention = FlashAttentionBuilder::new(2, 8).causal(true).build().unwrap();
    let weight = Param::new(Array::from_f32(1.0));
    let input = normal(5, &[2, 3, 2, 8], Dtype::Float32);
    assert_module(SelfAttention { weight, attention }, &input, &["weight"]);
}

#[test]
fn the_module_is_the_function() {
    let case =
        Case { sizes: Sizes([1, 4, 2, 5, 7, 8, 3]), causal: true, scale: Some(0.3), ..CASES[0] };
    let inputs = inputs(&case, Dtype::Float32);
    let mask = boolean(&[5, 7], third_row).array();
    let swapped = inputs.each_ref().map(|array| array.swap_axes(1, 2).unwrap());
    let [queries, keys, values] = &swapped;
    let mut module = FlashAttentionBuilder::new(4, 8)
        .num_kv_heads(2)
        .causal(true)
        .scale(0.3)
        .layout(Layout::Bhsd)
        .build()
        .unwrap();
    let mut check = |input: FlashAttentionInput, mask: Option<&Array>| {
        let y = module.forward(input).unwrap().swap_axes(1, 2).unwrap();
        let expected = expected(&case, &inputs, mask);
        assert_close("FlashAttention", &y, &expected, Tolerance::of(OP, Dtype::Float32));
    };
    check((queries, keys, values).into(), None);
    check((queries, keys, values, &mask).into(), Some(&mask));
    check((queries, keys, values, Some(&mask)).into(), Some(&mask));
}

#[test]
fn the_module_refuses_other_heads() {
    let mut module = FlashAttentionBuilder::new(4, 8).num_kv_heads(2).build().unwrap();
    let mut call = |queries: &[i32], keys: &[i32]| {
        let (queries, keys) = (zeros(queries), zeros(keys));
        module.forward((&queries, &keys, &keys)).unwrap_err().what().to_owned()
    };
    assert_eq!(
        call(&[2, 5, 2, 8], &[2, 7, 2, 8]),
        "[FlashAttention] queries must have shape [B, S_q, 4, 8] but got [2, 5, 2, 8]"
    );
    assert_eq!(
        call(&[2, 5, 4, 8], &[2, 7, 4, 8]),
        "[FlashAttention] keys must have shape [B, S_kv, 2, 8] but got [2, 7, 4, 8]"
    );
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    let refused = |builder: FlashAttentionBuilder| match builder.build() {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let of = FlashAttentionBuilder::new;
    assert_eq!(refused(of(0, 8)), "num_heads");
    assert_eq!(refused(of(4, 0)), "head_dim");
    assert_eq!(refused(of(4, 8).num_kv_heads(0)), "num_kv_heads");
    assert_eq!(refused(of(4, 8).num_kv_heads(3)), "num_heads");
    assert_eq!(refused(of(4, 8).scale(f32::NAN)), "scale");
    assert!(matches!(FlashAttention::new(4, 0), Err(Error::Value { argument: "head_dim", .. })));
}
