use mlx_primitives::{
    Backend, Layout, Result,
    attention::{FlashAttentionOptions, flash_attention, flash_attention_with_lse},
    dispatch::{Context, Target},
};
use mlx_rs::{Array, Dtype, error::Exception, transforms::compile::compile};

use super::{
    asked::{Asked, inputs, segments},
    cases::{CASES, COMBINED, Case, MANY_ROWS, OPTIONS, additive, boolean, case, third_row},
};
use crate::support::{
    FLOATING,
    backends::{on_backends, on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

pub(crate) const OP: &str = "flash_attention";

type Options<'a> = FlashAttentionOptions<'a>;

/// Calls in `layout` on `[B, S, H, D]` arrays, and answers in that order.
fn run_in(layout: Layout, inputs: &[Array; 3], options: Options) -> Result<Array> {
    let [queries, keys, values] = inputs.each_ref().map(|array| swap(layout, array));
    let result = flash_attention(queries, keys, values, Options { layout, ..options })?;
    Ok(swap(layout, &result))
}

/// The same with the log-sum-exp, which has one order.
fn run_with_lse(layout: Layout, inputs: &[Array; 3], options: Options) -> Result<(Array, Array)> {
    let [queries, keys, values] = inputs.each_ref().map(|array| swap(layout, array));
    let options = Options { layout, ..options };
    let (result, lse) = flash_attention_with_lse(queries, keys, values, options)?;
    Ok((swap(layout, &result), lse))
}

fn swap(layout: Layout, array: &Array) -> Array {
    match layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    }
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

/// The log-sum-exp is f32 whatever the dtype. It moves by no more than the scores do, and those of bf16 that are capped by
/// an NVIDIA GPU are documented to be exact to 2^-11 of themselves.
fn lse_tolerance(case: &Case, dtype: Dtype, backend: Backend) -> Tolerance {
    let exact = Tolerance::of("reference", Dtype::Float32);
    let on_cuda = Context::current().unwrap().target == Target::Cuda;
    match case.soft_cap {
        Some(cap) if on_cuda && dtype == Dtype::Bfloat16 && backend == Backend::Kernel => {
            Tolerance { atol: exact.atol + f64::from(cap) * 0.5_f64.powi(11), ..exact }
        }
        _ => exact,
    }
}

/// Where all backends run, those without a kernel run without the log-sum-exp too, which costs a kernel nothing.
fn check_case(case: &Case, dtype: Dtype, layout: Layout, backends: &[Backend]) {
    let (asked, segments) = (Asked::new(case, dtype), segments(case));
    let (expected, sums) = asked.tensors().expected(case, None);
    let check = |what: &str, backend, y: &Array| {
        assert_eq!(y.dtype(), dtype, "{what}");
        assert_close(what, y, &expected, tolerance(backend, dtype));
        assert_exact_zeros(what, y, &expected);
    };
    let what = |backend| format!("{OP} {} {dtype:?} {layout:?} on {backend}", case.name);
    let options = |dispatch| Options { dispatch, ..asked.options(case, &segments) };
    on_backends(
        with_kernels(false),
        OP,
        |dispatch| run_in(layout, &asked.inputs, options(dispatch)),
        |backend, y| check(&what(backend), backend, &y),
    );
    on_backends(
        backends,
        OP,
        |dispatch| run_with_lse(layout, &asked.inputs, options(dispatch)),
        |backend, (y, lse)| {
            let what = format!("{} with log-sum-exp", what(backend));
            check(&what, backend, &y);
            assert_eq!(lse.dtype(), Dtype::Float32, "{what}");
            assert_close(&what, &lse, &sums, lse_tolerance(case, dtype, backend));
        },
    );
}

fn check_cases(cases: &[Case]) {
    for (turn, case) in cases.iter().enumerate() {
        for (i, dtype) in FLOATING.into_iter().enumerate() {
            for (j, layout) in [Layout::Bshd, Layout::Bhsd].into_iter().enumerate() {
                check_case(case, dtype, layout, with_kernels(turn % 6 == 3 * j + i));
            }
        }
    }
}

#[test]
fn every_backend_matches_the_oracle() {
    check_cases(CASES);
}

#[test]
fn every_option_alone_matches_the_oracle() {
    check_cases(OPTIONS);
}

#[test]
fn many_rows_match_the_oracle() {
    for (turn, case) in MANY_ROWS.iter().enumerate() {
        for dtype in FLOATING {
            let layout = [Layout::Bshd, Layout::Bhsd][turn % 2];
            check_case(case, dtype, layout, with_kernels(true));
        }
    }
}

#[test]
fn options_together_match_the_oracle() {
    check_cases(COMBINED);
}

#[test]
fn a_half_precision_mask_serves_f32_queries() {
    let case = Case {
        mask: Some(additive(&[5, 7], -1e38, third_row)),
        ..case("an f16 mask", [1, 2, 2, 5, 7, 32, 32])
    };
    let mut asked = Asked::new(&case, Dtype::Float32);
    asked.mask = asked.mask.map(|mask| mask.as_dtype(Dtype::Float16).unwrap());
    let (expected, _) = asked.tensors().expected(&case, None);
    on_each_backend(
        OP,
        |dispatch| {
            let options = Options { dispatch, ..asked.options(&case, &None) };
            run_in(Layout::Bshd, &asked.inputs, options)
        },
        |backend, y| {
            assert_eq!(y.dtype(), Dtype::Float32);
            let what = format!("{OP} with an f16 mask on {backend}");
            assert_close(&what, &y, &expected, Tolerance::of(OP, Dtype::Float32));
            assert_exact_zeros(&what, &y, &expected);
        },
    );
}

/// Sinks and slopes keep their own precision: MLX's op would round them, and refuses.
#[test]
fn sinks_and_slopes_may_be_of_another_dtype() {
    let case = Case { sinks: Some(2.0), ..case("f32 sinks", [1, 4, 2, 5, 7, 32, 32]) };
    for (dtype, of_sinks) in [
        (Dtype::Bfloat16, Dtype::Float32),
        (Dtype::Float16, Dtype::Bfloat16),
        (Dtype::Float32, Dtype::Float16),
    ] {
        let mut asked = Asked::new(&case, Dtype::Float32);
        asked.inputs = inputs(&case, dtype);
        asked.sinks = asked.sinks.map(|sinks| sinks.as_dtype(of_sinks).unwrap());
        asked.slopes = asked.sinks.clone();
        let (expected, _) = asked.tensors().expected(&case, None);
        on_each_backend(
            OP,
            |dispatch| {
                let options = Options { dispatch, ..asked.options(&case, &None) };
                run_in(Layout::Bshd, &asked.inputs, options)
            },
            |backend, y| {
                let what = format!("{OP} {dtype:?} with {of_sinks:?} sinks on {backend}");
                assert_close(&what, &y, &expected, tolerance(backend, dtype));
            },
        );
    }
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

/// Bounds that say nonsense are not read on the host; they must do no harm.
#[test]
fn nonsense_segments_do_no_harm() {
    let few = (case("nonsense", [1, 2, 1, 9, 11, 8, 8]), Dtype::Float32);
    let many = (case("nonsense for many", [1, 2, 1, 130, 70, 8, 8]), Dtype::Float16);
    for (case, dtype) in [few, many] {
        let asked = Asked::new(&case, dtype);
        for bounds in [[5, 2, 9], [-7, 40, 3], [i32::MIN, 0, i32::MAX], [3, 4, 5]] {
            let bounds = Array::from_slice(&bounds, &[3]);
            let segments = Some([bounds.clone(), bounds]);
            on_each_backend(
                OP,
                |dispatch| {
                    let options = asked.options(&case, &segments);
                    let options = Options { dispatch, causal: true, ..options };
                    run_in(Layout::Bshd, &asked.inputs, options)
                },
                |_, y| assert!(Tensor::of(&y).values.iter().all(|value| value.is_finite())),
            );
        }
    }
}

#[test]
fn an_infinite_value_is_all_that_its_column_holds() {
    const SIZE: usize = 32;
    const COLUMN: usize = 5;
    // Of the first key, which every query sees.
    let mut marks = vec![0.0_f32; 130 * SIZE];
    marks[COLUMN] = f32::INFINITY;
    let marks = Array::from_slice(&marks, &[1, 130, 1, SIZE as i32]);
    // As many queries as each of the kernels takes.
    for (rows, dtype) in
        [1, 40, 130].into_iter().flat_map(|rows| FLOATING.map(|dtype| (rows, dtype)))
    {
        let sizes = [1, 2, 1, rows, 130, SIZE as i32, SIZE as i32];
        let [queries, keys, values] = inputs(&case("an infinite value", sizes), dtype);
        let values = values.add(marks.as_dtype(dtype).unwrap()).unwrap();
        let inputs = [queries, keys, values];
        on_backends(
            with_kernels(true),
            OP,
            |dispatch| {
                let options = Options { causal: true, dispatch, ..Default::default() };
                run_in(Layout::Bshd, &inputs, options)
            },
            |backend, y| {
                for (place, number) in Tensor::of(&y).values.into_iter().enumerate() {
                    let right = match place % SIZE {
                        COLUMN => number == f64::INFINITY,
                        _ => number.is_finite(),
                    };
                    assert!(right, "{rows} {dtype:?} on {backend}: {number} at {place}");
                }
            },
        );
    }
}

#[test]
fn it_compiles() {
    let attend = |inputs: &[Array]| -> Result<Vec<Array>, Exception> {
        let options = Options { causal: true, mask: inputs.get(3), ..Default::default() };
        Ok(vec![flash_attention(&inputs[0], &inputs[1], &inputs[2], options)?])
    };
    let case = case("compiled", [1, 4, 2, 9, 7, 32, 32]);
    let mut inputs = inputs(&case, Dtype::Float32).to_vec();
    inputs.push(boolean(&[9, 7], third_row).array());
    let compiled = compile(attend, None)(&inputs).unwrap();
    let expected = Tensor::of(&attend(&inputs).unwrap()[0]);
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    assert_close("compiled flash_attention", &compiled[0], &expected, tolerance);
}

#[test]
fn everything_compiles() {
    let Some(case) = COMBINED.iter().find(|case| case.name == "everything in segments") else {
        panic!("renamed")
    };
    let (asked, segments) = (Asked::new(case, Dtype::Float32), segments(case));
    let (list, (expected, sums)) = (asked.list(), asked.tensors().expected(case, None));
    let attend = move |list: &[Array]| -> Result<Vec<Array>, Exception> {
        let asked = asked.with(list);
        let [queries, keys, values] = &asked.inputs;
        let options = asked.options(case, &segments);
        let (y, lse) = flash_attention_with_lse(queries, keys, values, options)?;
        Ok(vec![y, lse])
    };
    let compiled = compile(attend, None)(&list).unwrap();
    let tolerance = Tolerance::of("reference", Dtype::Float32);
    assert_close("compiled", &compiled[0], &expected, tolerance);
    assert_close("compiled log-sum-exp", &compiled[1], &sums, tolerance);
}
