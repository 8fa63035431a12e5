use std::slice;

use mlx_primitives::{
    Backend, Dispatch, Result,
    kernel::inference,
    scan::{
        SelectiveScanOptions, SelectiveStepOptions, selective_scan, selective_scan_with_state,
        selective_state_update,
    },
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, indexing::IndexOp},
    transforms::{compile::compile, fallible_jvp, fallible_vjp},
};

use super::{
    assert_gradients_alike,
    selective_oracle::{self, Arguments},
};
use crate::support::{
    FLOATING,
    backends::{on_backends, on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::{assert_gradients, gradients_on_each_backend},
    sample::{Random, normal, strided},
    tensor::Tensor,
};

const OP: &str = "selective_scan";

#[derive(Debug, Clone, Copy)]
struct Case {
    name: &'static str,
    /// `[B, L, D]`.
    shape: [i32; 3],
    states: i32,
    /// Of `b` and `c`, which are `[B, L, N]` where there is none.
    groups: Option<i32>,
    options: bool,
    softplus: bool,
    segments: Option<&'static [i32]>,
    strided: bool,
}

const fn case(name: &'static str, shape: [i32; 3], states: i32) -> Case {
    Case {
        name,
        shape,
        states,
        groups: None,
        options: false,
        softplus: false,
        segments: None,
        strided: false,
    }
}

const CASES: &[Case] = &[
    case("one of each", [1, 1, 1], 1),
    Case { options: true, softplus: true, ..case("mamba", [2, 70, 33], 16) },
    Case { softplus: true, ..case("16 steps", [2, 16, 8], 16) },
    Case { options: true, ..case("17 steps", [1, 17, 3], 5) },
    Case { groups: Some(1), strided: true, ..case("strided", [2, 33, 40], 4) },
    Case { groups: Some(3), options: true, ..case("groups", [2, 9, 12], 17) },
    Case { groups: Some(4), softplus: true, ..case("a group a channel", [1, 40, 4], 3) },
    Case { options: true, ..case("64 states", [1, 37, 10], 64) },
    Case { softplus: true, ..case("100 states", [1, 20, 5], 100) },
    Case { options: true, softplus: true, ..case("256 states", [1, 13, 3], 256) },
    Case {
        options: true,
        softplus: true,
        segments: Some(&[0, 0, 5, 38, 38, 77]),
        ..case("segments", [1, 77, 6], 16)
    },
    Case { segments: Some(&[0, 40]), groups: Some(2), ..case("one segment", [1, 40, 6], 2) },
    case("no step", [2, 0, 3], 4),
    Case { segments: Some(&[0]), ..case("no segment", [1, 0, 3], 4) },
    case("no batch", [0, 5, 3], 4),
];

/// Arguments that decay, as those of a model do.
struct Inputs {
    arrays: Vec<Array>,
}

impl Inputs {
    fn new(case: Case, dtype: Dtype) -> Self {
        let [batch, length, channels] = case.shape;
        let states = case.states;
        let by_state = match case.groups {
            Some(groups) => vec![batch, length, groups, states],
            None => vec![batch, length, states],
        };
        let half = Array::from_f32(0.5).as_dtype(dtype).unwrap();
        // Without softplus a step may not fall below zero, for with a negative `a` states would grow.
        let delta = normal(2, &case.shape, dtype);
        let delta =
            if case.softplus { delta } else { delta.abs().unwrap().multiply(half).unwrap() };
        let a = normal(3, &[channels, states], Dtype::Float32).abs().unwrap().negative().unwrap();
        // Outputs of about one however many states are added up, for a sum rounds in proportion to its terms.
        let share = Array::from_f32((states as f32).sqrt().recip()).as_dtype(dtype).unwrap();
        let c = normal(5, &by_state, dtype).multiply(share).unwrap();
        let (u, b) = (normal(1, &case.shape, dtype), normal(4, &by_state, dtype));
        let mut arrays = vec![u, delta, a, b, c];
        if case.strided {
            arrays = arrays.iter().map(strided).collect();
        }
        if case.options {
            let sequences = case.segments.map_or(batch, |cuts| cuts.len() as i32 - 1);
            let bias = normal(8, &[channels], Dtype::Float32).abs().unwrap();
            arrays.extend([
                normal(6, &[channels], Dtype::Float32),
                normal(7, &case.shape, dtype),
                bias,
                normal(9, &[sequences, channels, states], Dtype::Float32),
            ]);
        }
        Self { arrays }
    }

    fn tensors(&self) -> Vec<Tensor> {
        self.arrays.iter().map(Tensor::of).collect()
    }
}

fn ours(arrays: &[Array], case: &Case, dispatch: Dispatch) -> Result<(Array, Array)> {
    let options = SelectiveScanOptions {
        d: arrays.get(5),
        z: arrays.get(6),
        delta_bias: arrays.get(7),
        delta_softplus: case.softplus,
        initial_state: arrays.get(8),
        segments: case.segments,
        dispatch,
    };
    selective_scan_with_state(&arrays[0], &arrays[1], &arrays[2], &arrays[3], &arrays[4], options)
}

fn oracle(tensors: &[Tensor], case: &Case) -> (Tensor, Tensor) {
    selective_oracle::scan(&Arguments {
        u: &tensors[0],
        delta: &tensors[1],
        a: &tensors[2],
        b: &tensors[3],
        c: &tensors[4],
        d: tensors.get(5),
        z: tensors.get(6),
        bias: tensors.get(7),
        state: tensors.get(8),
        softplus: case.softplus,
        segments: case.segments,
    })
}

#[test]
fn both_outputs_match_the_oracle_on_every_backend() {
    for (which, case) in CASES.iter().enumerate() {
        for (turn, dtype) in FLOATING.into_iter().enumerate() {
            let inputs = Inputs::new(*case, dtype);
            let (expected, expected_state) = oracle(&inputs.tensors(), case);
            on_backends(
                with_kernels(which % FLOATING.len() == turn),
                OP,
                |dispatch| ours(&inputs.arrays, case, dispatch),
                |backend, (y, state)| {
                    assert_eq!(
                        (y.dtype(), state.dtype()),
                        (dtype, Dtype::Float32),
                        "{}",
                        case.name
                    );
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                    let tolerance = Tolerance::of(OP, Dtype::Float32);
                    assert_close(&format!("{what}: state"), &state, &expected_state, tolerance);
                },
            );
        }
    }
}

/// Then the kernel saves no states for a gradient.
#[test]
fn results_are_the_same_where_no_gradient_may_follow() {
    let segments = Case { segments: Some(&[0, 20, 20, 37]), ..case("segments", [1, 37, 5], 16) };
    for case in [case("rows", [2, 37, 5], 16), segments] {
        let inputs = Inputs::new(case, Dtype::Float32);
        let run = |dispatch| {
            let there = ours(&inputs.arrays, &case, dispatch)?;
            Ok([there, inference(|| ours(&inputs.arrays, &case, dispatch))?])
        };
        on_each_backend(OP, run, |backend, [(y, state), (same_y, same_state)]| {
            for (result, same) in [(y, same_y), (state, same_state)] {
                let what = format!("{OP} {} on {backend}, for inference", case.name);
                assert_close(&what, &same, &Tensor::of(&result), Tolerance::EXACT);
            }
        });
    }
}

/// With every option; without any; grouped; with more lanes than channels; in segments, one of them empty.
const GRADIENTS: &[Case] = &[
    Case { options: true, softplus: true, ..case("all", [2, 5, 3], 2) },
    case("none", [1, 37, 2], 2),
    Case { groups: Some(2), options: true, ..case("groups", [1, 4, 4], 3) },
    Case { options: true, softplus: true, ..case("many states", [1, 3, 2], 20) },
    Case {
        options: true,
        softplus: true,
        segments: Some(&[0, 2, 2, 6]),
        ..case("segments", [1, 6, 2], 2)
    },
];

#[test]
fn gradients_match_finite_differences() {
    for case in GRADIENTS {
        let inputs = Inputs::new(*case, Dtype::Float32).tensors();
        gradients_on_each_backend(
            OP,
            &inputs,
            |inputs| {
                let (y, state) = oracle(inputs, case);
                let both = [y.values, state.values].concat();
                Tensor::new(&[both.len()], both)
            },
            |arrays, dispatch| {
                let (y, state) = ours(arrays, case, dispatch)?;
                Ok(concatenate(&[y.reshape(&[-1])?, state.reshape(&[-1])?], 0)?)
            },
        );
    }
}

/// Beyond one block of the reference, whose states are then computed twice.
#[test]
fn gradients_of_long_sequences_match_finite_differences() {
    let case = Case { options: true, softplus: true, ..case("long", [1, 150, 1], 1) };
    let inputs = Inputs::new(case, Dtype::Float32).tensors();
    assert_gradients(
        "long",
        &inputs,
        |inputs| oracle(inputs, &case).0,
        |arrays| Ok(ours(arrays, &case, Dispatch::Auto)?.0),
    );
}

/// Two sequences after many without a step: 33 channels of so many take over 200 groups of threads, and then fewer threads
/// share a channel in the gradient.
const MANY: [i32; 102] = {
    let mut cuts = [0; 102];
    [cuts[100], cuts[101]] = [20, 53];
    cuts
};

/// Kernels against the reference at sizes that finite differences would take minutes for.
#[test]
fn gradients_of_kernels_are_those_of_the_reference() {
    for (case, dtype) in [
        (Case { options: true, softplus: true, ..case("mamba", [2, 70, 40], 16) }, Dtype::Float32),
        (Case { options: true, softplus: true, ..case("bf16", [1, 37, 33], 7) }, Dtype::Bfloat16),
        (Case { groups: Some(2), ..case("f16", [1, 20, 6], 16) }, Dtype::Float16),
        (Case { groups: Some(2), ..case("64 states", [1, 45, 10], 50) }, Dtype::Float32),
        (Case { options: true, ..case("128 states", [1, 37, 5], 128) }, Dtype::Float32),
        (Case { softplus: true, ..case("256 states", [1, 35, 3], 200) }, Dtype::Float32),
        (
            Case {
                options: true,
                softplus: true,
                segments: Some(&MANY),
                ..case("many", [1, 53, 33], 16)
            },
            Dtype::Float32,
        ),
        (case("many of few steps", [200, 3, 33], 5), Dtype::Bfloat16),
    ] {
        let inputs = Inputs::new(case, dtype);
        let run = |arrays: &[Array], dispatch| ours(arrays, &case, dispatch);
        assert_gradients_alike(OP, case.name, &inputs.arrays, run);
    }
}

/// Of a case, with its arrays from step `from` to step `to` and another state.
fn part(case: &Case, inputs: &Inputs, range: [i32; 2], state: Option<&Array>) -> (Array, Array) {
    let [from, to] = range;
    let cut = |array: &Array| array.index((.., from..to));
    let arrays = &inputs.arrays;
    let z = arrays.get(6).map(cut);
    let options = SelectiveScanOptions {
        d: arrays.get(5),
        z: z.as_ref(),
        delta_bias: arrays.get(7),
        delta_softplus: case.softplus,
        initial_state: state,
        ..Default::default()
    };
    let [u, delta, b, c] = [0, 1, 3, 4].map(|which| cut(&arrays[which]));
    selective_scan_with_state(u, delta, &arrays[2], b, c, options).unwrap()
}

#[test]
fn a_sequence_cut_anywhere_is_the_whole_one() {
    let case = Case { options: true, softplus: true, ..case("cut", [2, 90, 5], 4) };
    let inputs = Inputs::new(case, Dtype::Float32);
    let (whole, end) = ours(&inputs.arrays, &case, Dispatch::Auto).unwrap();
    let mut random = Random::new(3);
    for cut in [0, 1, 64, 89, 90].into_iter().chain((0..5).map(|_| random.below(91) as i32)) {
        let (first, state) = part(&case, &inputs, [0, cut], inputs.arrays.get(8));
        let (second, state) = part(&case, &inputs, [cut, 90], Some(&state));
        let joined = concatenate(&[first, second], 1).unwrap();
        let tolerance = Tolerance::of(OP, Dtype::Float32);
        assert_close(&format!("cut at {cut}"), &joined, &Tensor::of(&whole), tolerance);
        assert_close(&format!("cut at {cut}: state"), &state, &Tensor::of(&end), tolerance);
    }
}

#[test]
fn segments_are_separate_runs() {
    let mut random = Random::new(5);
    for count in 1..6 {
        let mut segments: Vec<_> = (0..count).map(|_| random.below(97) as i32).collect();
        segments.extend([0, 96]);
        segments.sort_unstable();
        let case = Case { softplus: true, ..case("runs", [1, 96, 3], 4) };
        let inputs = Inputs::new(case, Dtype::Float32);
        let [u, delta, a, b, c] = &inputs.arrays[..] else { panic!("five arrays") };
        let options = SelectiveScanOptions {
            delta_softplus: true,
            segments: Some(&segments),
            ..Default::default()
        };
        let (y, states) = selective_scan_with_state(u, delta, a, b, c, options).unwrap();
        for (which, pair) in (0..).zip(segments.windows(2)) {
            let (alone, state) = part(&case, &inputs, [pair[0], pair[1]], None);
            let here = y.index((.., pair[0]..pair[1]));
            let what = format!("{which} of {segments:?}");
            assert_close(&what, &here, &Tensor::of(&alone), Tolerance::EXACT);
            let own = states.index(which..which + 1);
            assert_close(&what, &own, &Tensor::of(&state), Tolerance::EXACT);
        }
    }
}

/// Forward mode is that of the reference, reverse mode the kernel's: each is the other's transpose.
#[test]
fn forward_mode_is_the_transpose_of_reverse_mode() {
    let case = Case { options: true, softplus: true, ..case("modes", [1, 20, 3], 4) };
    let inputs = Inputs::new(case, Dtype::Float32).arrays;
    let tangents: Vec<_> = (20..)
        .zip(&inputs)
        .map(|(seed, input)| normal(seed, input.shape(), Dtype::Float32))
        .collect();
    let cotangent = normal(40, &case.shape, Dtype::Float32);
    let product = |x: &[Array], y: &[Array]| -> f64 {
        let pairs = x.iter().zip(y).map(|(x, y)| (Tensor::of(x), Tensor::of(y)));
        let of = |(x, y): (Tensor, Tensor)| -> f64 {
            x.values.iter().zip(&y.values).map(|(x, y)| x * y).sum()
        };
        pairs.map(of).sum()
    };
    on_each_backend(
        OP,
        |dispatch| {
            let run = |arrays: &[Array]| -> Result<Vec<Array>, Exception> {
                Ok(vec![ours(arrays, &case, dispatch)?.0])
            };
            ours(&inputs, &case, dispatch)?;
            let (_, pushed) = fallible_jvp(run, &inputs, &tangents)?;
            let (_, pulled) = fallible_vjp(run, &inputs, slice::from_ref(&cotangent))?;
            Ok([product(&pushed, slice::from_ref(&cotangent)), product(&pulled, &tangents)])
        },
        |backend, [forward, reverse]| {
            let distance = (forward - reverse).abs();
            assert!(distance < 1e-4 * forward.abs(), "{backend}: {forward} and {reverse}");
        },
    );
}

#[test]
fn one_step_at_a_time_is_the_whole_sequence() {
    for (groups, dtype) in [(None, Dtype::Float32), (Some(2), Dtype::Bfloat16)] {
        let case = Case { options: true, softplus: true, groups, ..case("steps", [2, 6, 4], 3) };
        let inputs = Inputs::new(case, dtype);
        let (expected, expected_state) = oracle(&inputs.tensors(), &case);
        on_each_backend(
            OP,
            |dispatch| {
                let arrays = &inputs.arrays;
                let (mut state, mut outputs) = (arrays[8].clone(), Vec::new());
                for t in 0..6 {
                    let [u, delta, b, c, z] = [0, 1, 3, 4, 6].map(|i| arrays[i].index((.., t)));
                    let options = SelectiveStepOptions {
                        d: arrays.get(5),
                        z: Some(&z),
                        delta_bias: arrays.get(7),
                        delta_softplus: true,
                        dispatch,
                    };
                    let (y, next) =
                        selective_state_update(&state, u, delta, &arrays[2], b, c, options)?;
                    outputs.push(y.expand_dims(1)?);
                    state = next;
                }
                Ok((concatenate(&outputs, 1)?, state))
            },
            |backend, (y, state)| {
                let what = format!("steps on {backend}");
                assert_close(&what, &y, &expected, Tolerance::of(OP, dtype));
                let tolerance = Tolerance::of(OP, Dtype::Float32);
                assert_close(&format!("{what}: state"), &state, &expected_state, tolerance);
            },
        );
    }
}

/// Decays next to one and next to zero, for as long as any model runs; on kernels for what a sanitizer runs in seconds.
#[test]
fn it_is_stable_over_65536_steps() {
    assert_stable(1 << 16, with_kernels(false));
    assert_stable(1 << 11, with_kernels(true));
}

fn assert_stable(length: i32, backends: &[Backend]) {
    let u = normal(1, &[1, length, 2], Dtype::Float32);
    let delta = Array::full::<f32>(&[1, length, 2], Array::from_slice(&[1e-4_f32, 50.0], &[2]));
    let delta = delta.unwrap();
    let a = Array::from_slice(&[-1e-3_f32, -1.0, -1e-3, -1.0], &[2, 2]);
    let b = normal(2, &[1, length, 2], Dtype::Float32);
    let (expected, expected_state) = selective_oracle::scan(&Arguments {
        u: &Tensor::of(&u),
        delta: &Tensor::of(&delta),
        a: &Tensor::of(&a),
        b: &Tensor::of(&b),
        c: &Tensor::of(&b),
        d: None,
        z: None,
        bias: None,
        state: None,
        softplus: false,
        segments: None,
    });
    // A decay of 1 - 1e-7 is off by 2^-25, and 65536 of them by 2^-9 of what they keep; one of 0.95 by 2^-24 of states of
    // several hundreds.
    let tolerance = Tolerance { rtol: 2e-3, atol: 1e-3 };
    on_backends(
        backends,
        OP,
        |dispatch| {
            let options = SelectiveScanOptions { dispatch, ..Default::default() };
            selective_scan_with_state(&u, &delta, &a, &b, &b, options)
        },
        |backend, (y, state)| {
            let what = format!("{length} steps on {backend}");
            assert_close(&what, &y, &expected, tolerance);
            assert_close(&format!("{what}: state"), &state, &expected_state, tolerance);
        },
    );
}

#[test]
fn it_compiles() {
    let case = Case { softplus: true, ..case("compiled", [2, 9, 4], 3) };
    let arrays = Inputs::new(case, Dtype::Float32).arrays;
    let scan = move |arrays: &[Array]| -> Result<Vec<Array>, Exception> {
        let (y, state) = ours(arrays, &case, Dispatch::Auto)?;
        Ok(vec![y, state])
    };
    let compiled = compile(scan, None)(&arrays).unwrap();
    for (got, expected) in compiled.iter().zip(&scan(&arrays).unwrap()) {
        let tolerance = Tolerance::of(OP, Dtype::Float32);
        assert_close("compiled", got, &Tensor::of(expected), tolerance);
    }
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let good = Inputs::new(case("good", [1, 6, 4], 3), Dtype::Float32).arrays;
    let float = |shape: &[i32]| normal(1, shape, Dtype::Float32);
    let with = |which: usize, array: Array| {
        let mut arrays = good.clone();
        arrays[which] = array;
        let options = SelectiveScanOptions::default();
        let [u, delta, a, b, c] = &arrays[..] else { panic!("five arrays") };
        selective_scan(u, delta, a, b, c, options).unwrap_err().to_string()
    };
    for (which, array, message) in [
        (0, float(&[6, 4]), "[selective_scan] u must have shape [B, L, D] but got [6, 4]"),
        (0, float(&[1, 6, 0]), "[selective_scan] u must have shape [..., D] with D at least 1"),
        (
            1,
            float(&[1, 5, 4]),
            "[selective_scan] delta must have shape [1, 6, 4] but got [1, 5, 4]",
        ),
        (
            1,
            normal(1, &[1, 6, 4], Dtype::Float16),
            "[selective_scan] delta must have dtype Float32",
        ),
        (2, float(&[3, 3]), "[selective_scan] a must have shape [4, N] but got [3, 3]"),
        (2, float(&[4, 0]), "[selective_scan] a must have shape [..., D] with D at least 1"),
        (3, float(&[1, 6, 2]), "[selective_scan] b must have shape [1, 6, 3] but got [1, 6, 2]"),
        (3, float(&[1, 6, 2, 3]), "[selective_scan] c must have shape [1, 6, 2, 3]"),
        (4, float(&[1, 5, 3]), "[selective_scan] c must have shape [1, 6, 3] but got [1, 5, 3]"),
    ] {
        let error = with(which, array);
        assert!(error.starts_with(message), "{error}");
    }
}

#[test]
fn bad_options_are_errors_that_name_them() {
    let good = Inputs::new(case("good", [1, 6, 4], 3), Dtype::Float32).arrays;
    let float = |shape: &[i32]| normal(1, shape, Dtype::Float32);
    let call = |b: &Array, options: SelectiveScanOptions| {
        let [u, delta, a, ..] = &good[..] else { panic!("five arrays") };
        selective_scan(u, delta, a, b, b, options).unwrap_err().to_string()
    };
    let (wide, halves) = (float(&[5]), normal(1, &[1, 4, 3], Dtype::Float16));
    let none = SelectiveScanOptions::default();
    let refusals: [(SelectiveScanOptions, &str); 9] = [
        (SelectiveScanOptions { d: Some(&wide), ..none }, "d must have shape [4] but got [5]"),
        (SelectiveScanOptions { z: Some(&wide), ..none }, "z must have shape [1, 6, 4]"),
        (
            SelectiveScanOptions { delta_bias: Some(&wide), ..none },
            "delta_bias must have shape [4]",
        ),
        (
            SelectiveScanOptions { initial_state: Some(&halves), ..none },
            "initial_state must have dtype Float32",
        ),
        (
            SelectiveScanOptions { initial_state: Some(&good[0]), ..none },
            "initial_state must have shape [1, 4, 3]",
        ),
        (SelectiveScanOptions { segments: Some(&[]), ..none }, "segments must have a first number"),
        (SelectiveScanOptions { segments: Some(&[1, 6]), ..none }, "segments must start at 0"),
        (SelectiveScanOptions { segments: Some(&[0, 4, 2, 6]), ..none }, "segments must not fall"),
        (SelectiveScanOptions { segments: Some(&[0, 5]), ..none }, "segments must end at L = 6"),
    ];
    for (options, message) in refusals {
        let error = call(&good[3], options);
        assert!(error.starts_with(&format!("[selective_scan] {message}")), "{error}");
    }
    assert_eq!(
        call(&float(&[1, 6, 3, 3]), none),
        "[selective_scan] groups of b must divide D = 4 but got 3"
    );
    let batch = Inputs::new(case("batch", [2, 6, 4], 3), Dtype::Float32).arrays;
    let [u, delta, a, b, c] = &batch[..] else { panic!("five arrays") };
    let options = SelectiveScanOptions { segments: Some(&[0, 6]), ..none };
    assert_eq!(
        selective_scan(u, delta, a, b, c, options).unwrap_err().to_string(),
        "[selective_scan] segments must come with a batch of one but got 2"
    );
    let one = float(&[2, 4]);
    let states = float(&[2, 3]);
    let step = selective_state_update(&one, &one, &one, a, &states, &states, Default::default());
    let error = step.unwrap_err().to_string();
    let message = "[selective_state_update] state must have shape [2, 4, 3] but got [2, 4]";
    assert_eq!(error, message);
}
