//! Gradients of attention against finite differences of its definition.

use mlx_primitives::{
    Dispatch, Result,
    attention::{FlashAttentionOptions, flash_attention, flash_attention_with_lse},
};
use mlx_rs::{Array, Dtype, ops::concatenate};

use super::{
    asked::{Asked, segments},
    cases::{Case, MaskOf, SlopesOf, additive, boolean, case, some, third_row},
    flash::OP,
};
use crate::support::{
    gradient::{f16_gradients_on_each_backend, gradients_on_each_backend},
    sample::Random,
    tensor::Tensor,
};

const INF: f32 = f32::INFINITY;

/// Checks the gradients of every array that has one: queries, keys, values, an additive mask, slopes and sinks.
fn check(case: &Case) {
    let oracle = |asked: Asked<Tensor>| asked.expected(case, None).0;
    check_with(case, oracle, |[queries, keys, values], options| {
        flash_attention(queries, keys, values, options)
    });
}

/// The same through the log-sum-exp. A row that sees no key has one of −∞, of which nothing is to be felt.
fn check_through_lse(case: &Case) {
    let oracle = |asked: Asked<Tensor>| {
        let (y, lse) = asked.expected(case, None);
        let sums = lse.values.iter().map(|&sum| if sum.is_finite() { sum } else { 0.0 });
        let values: Vec<_> = y.values.iter().copied().chain(sums).collect();
        Tensor::new(&[values.len()], values)
    };
    check_with(case, oracle, |[queries, keys, values], options| {
        let (y, lse) = flash_attention_with_lse(queries, keys, values, options)?;
        Ok(concatenate(&[y.flatten(None, None)?, lse.flatten(None, None)?], 0)?)
    });
}

fn check_with(
    case: &Case,
    oracle: impl Fn(Asked<Tensor>) -> Tensor,
    ours: impl Fn(&[Array; 3], FlashAttentionOptions) -> Result<Array>,
) {
    let (mut asked, segments) = (Asked::new(case, Dtype::Float32), segments(case));
    let is_boolean = case.mask.is_some_and(MaskOf::is_boolean);
    let mask = asked.mask.take_if(|_| is_boolean);
    let tensors = asked.tensors();
    let of_mask = mask.as_ref().map(Tensor::of);
    let complete = |list: &[Tensor]| {
        let asked = tensors.with(list);
        Asked { mask: asked.mask.clone().or_else(|| of_mask.clone()), ..asked }
    };
    gradients_on_each_backend(
        OP,
        &tensors.list(),
        |list| oracle(complete(list)),
        |list, dispatch: Dispatch| {
            let moved = asked.with(list);
            let options = moved.options(case, &segments);
            let mask = moved.mask.as_ref().or(mask.as_ref());
            ours(&moved.inputs, FlashAttentionOptions { mask, dispatch, ..options })
        },
    );
}

const PLAIN: Case = case("plain", [1, 4, 2, 4, 5, 4, 3]);
const CAUSAL: Case = Case { causal: true, ..PLAIN };
/// The first query comes before every key.
const LONGER: Case = Case { causal: true, ..case("longer", [2, 2, 1, 5, 4, 4, 4]) };
const IN_SEGMENTS: Case = Case { segments: Some([&[0, 1, 1, 4], &[0, 2, 3, 5]]), ..PLAIN };

#[test]
fn gradients_match_finite_differences() {
    check(&case("batches", [2, 2, 2, 3, 4, 5, 3]));
    check(&PLAIN);
    check(&Case { causal: true, ..case("causal", [1, 3, 1, 4, 4, 5, 5]) });
}

#[test]
fn gradients_in_f16_are_right_to_a_thousandth() {
    for case in [
        case("f16", [1, 4, 2, 9, 11, 8, 6]),
        Case {
            left: Some(5),
            soft_cap: Some(2.0),
            sinks: Some(0.5),
            slopes: Some(SlopesOf::Heads),
            ..Case { causal: true, ..case("f16, options", [1, 2, 1, 20, 20, 8, 8]) }
        },
    ] {
        let (asked, segments) = (Asked::new(&case, Dtype::Float16), segments(&case));
        let tensors = asked.tensors();
        f16_gradients_on_each_backend(
            OP,
            &tensors.list()[..3],
            |list| tensors.with(&with_rest(list, &tensors.list())).expected(&case, None).0,
            |list, dispatch| {
                let moved = asked.with(&with_rest(list, &asked.list()));
                let [queries, keys, values] = &moved.inputs;
                let options = moved.options(&case, &segments);
                flash_attention(
                    queries,
                    keys,
                    values,
                    FlashAttentionOptions { dispatch, ..options },
                )
            },
        );
    }
}

/// Those of `first` in place of as many of `all`.
fn with_rest<T: Clone>(first: &[T], all: &[T]) -> Vec<T> {
    first.iter().chain(&all[first.len()..]).cloned().collect()
}

#[test]
fn gradients_pass_by_hidden_rows() {
    check(&Case { causal: true, ..case("causal", [1, 2, 1, 5, 3, 4, 4]) });
    let mask = Some(boolean(&[1, 1, 4, 5], third_row));
    check(&Case { mask, ..PLAIN });
    check(&Case { mask, ..CAUSAL });
}

#[test]
fn gradients_reach_an_additive_mask() {
    check(&Case {
        mask: Some(additive(&[2, 1, 1, 5], -INF, |_| false)),
        ..case("by key", [2, 2, 1, 3, 5, 4, 4])
    });
    check(&Case { mask: Some(additive(&[4, 5], -INF, third_row)), ..PLAIN });
    check(&Case { mask: Some(additive(&[2, 5, 4], -1e38, third_row)), ..LONGER });
}

#[test]
fn gradients_of_windows() {
    check(&Case { left: Some(1), right: Some(0), ..PLAIN });
    check(&Case { left: Some(0), ..LONGER });
}

#[test]
fn gradients_through_a_soft_cap() {
    check(&Case { soft_cap: Some(0.7), ..PLAIN });
    check(&Case { soft_cap: Some(0.7), ..LONGER });
}

#[test]
fn gradients_of_slopes() {
    check(&Case { slopes: Some(SlopesOf::Heads), ..PLAIN });
    check(&Case { slopes: Some(SlopesOf::BatchAndHeads), ..LONGER });
}

#[test]
fn gradients_of_sinks() {
    check(&Case { sinks: Some(0.0), ..PLAIN });
    check(&Case { sinks: Some(1.0), ..LONGER });
    check(&Case { sinks: Some(0.0), mask: Some(boolean(&[4, 5], third_row)), ..PLAIN });
}

#[test]
fn gradients_in_segments() {
    check(&IN_SEGMENTS);
    check(&Case { causal: true, ..IN_SEGMENTS });
    // No kernel has the gradient of a mask, so the reference stands in.
    check(&Case { mask: Some(additive(&[4, 5], -INF, third_row)), ..IN_SEGMENTS });
}

#[test]
fn gradients_through_the_log_sum_exp() {
    check_through_lse(&PLAIN);
    check_through_lse(&LONGER);
    check_through_lse(&IN_SEGMENTS);
    check_through_lse(&Case { soft_cap: Some(0.7), left: Some(1), ..CAUSAL });
    check_through_lse(&Case { mask: Some(boolean(&[4, 5], third_row)), ..PLAIN });
    check_through_lse(&Case { sinks: Some(0.5), mask: Some(boolean(&[4, 5], third_row)), ..PLAIN });
    let mask = Some(additive(&[4, 5], -INF, third_row));
    check_through_lse(&Case { sinks: Some(0.5), slopes: Some(SlopesOf::Heads), mask, ..PLAIN });
}

/// Sinks of −∞ are none, and leave no NaN behind where a row sees no key either.
#[test]
fn gradients_pass_by_sinks_of_minus_infinity() {
    let without = Case { sinks: Some(-f64::INFINITY), ..PLAIN };
    check(&without);
    check_through_lse(&without);
    check(&Case { mask: Some(boolean(&[4, 5], third_row)), ..without });
}

/// Options drawn at random, each about as often as not.
fn drawn(random: &mut Random) -> Case {
    let longer = random.below(3) == 0;
    let (shape, sizes): (&[i32], _) =
        if longer { (&[5, 4], [1, 2, 1, 5, 4, 3, 2]) } else { (&[4, 5], [1, 2, 1, 4, 5, 3, 4]) };
    let segments: [&[i32]; 2] =
        if longer { [&[0, 2, 5, 5], &[0, 0, 3, 4]] } else { [&[0, 1, 1, 4], &[0, 2, 3, 5]] };
    let batch = 1 + random.below(2) as i32;
    let mut maybe = || random.below(2) == 0;
    let mut drawn = case("drawn", sizes);
    drawn.sizes.0[0] = batch;
    drawn.causal = maybe();
    drawn.left = maybe().then_some(1);
    drawn.right = maybe().then_some(1);
    drawn.soft_cap = maybe().then_some(0.9);
    let by_batch = if maybe() { SlopesOf::BatchAndHeads } else { SlopesOf::Heads };
    drawn.slopes = maybe().then_some(by_batch);
    let mask = if maybe() { additive(shape, -INF, some) } else { boolean(shape, third_row) };
    drawn.mask = maybe().then_some(mask);
    drawn.sinks = maybe().then_some(0.3);
    drawn.segments = (batch == 1 && maybe()).then_some(segments);
    drawn
}

#[test]
fn gradients_of_options_drawn_at_random() {
    let mut random = Random::new(71);
    for _ in 0..10 {
        let case = drawn(&mut random);
        check(&case);
        check_through_lse(&case);
    }
}
