//! Linear attention that fades, and that replaces what it stored.

use mlx_primitives::{
    Result,
    scan::{
        GatedLinearOptions, GatedLinearStep, gated_delta_rule, gated_delta_rule_step,
        gated_delta_rule_with_state, gated_linear_attention, gated_linear_attention_step,
        gated_linear_attention_with_state, retention_log_decays,
    },
};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, sigmoid, stack},
};

use super::{assert_gradients_alike, dtype_of_states, tolerance};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    Delta,
}

impl Kind {
    const fn op(self) -> &'static str {
        match self {
            Self::Linear => "gated_linear_attention",
            Self::Delta => "gated_delta_rule",
        }
    }
}

/// Queries, keys, values, beta, logarithms of decays, and the initial state.
type Inputs<T> = [T; 6];

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    kind: Kind,
    /// `B`, `L`, `H`, `D`, `D_v`
    sizes: [i32; 5],
    /// Axes of the decay.
    decay: usize,
    chunk: i32,
}

const fn case(name: &'static str, kind: Kind, sizes: [i32; 5], decay: usize, chunk: i32) -> Case {
    Case { name, kind, sizes, decay, chunk }
}

const CASES: &[Case] = &[
    case("one step", Kind::Linear, [2, 1, 2, 3, 4], 3, 64),
    case("a retention", Kind::Linear, [2, 37, 3, 4, 5], 1, 8),
    case("a decay a step", Kind::Linear, [1, 33, 2, 4, 3], 3, 16),
    case("a decay an element", Kind::Linear, [2, 37, 2, 4, 3], 4, 16),
    case("a decay an element, in parts", Kind::Linear, [1, 75, 2, 3, 2], 4, 64),
    case("one step replaced", Kind::Delta, [1, 1, 2, 3, 4], 3, 64),
    case("replaced", Kind::Delta, [2, 37, 2, 4, 5], 3, 8),
    case("replaced, chunks of no power", Kind::Delta, [1, 75, 2, 4, 3], 1, 23),
    case("replaced, one chunk", Kind::Delta, [1, 50, 1, 6, 3], 3, 64),
];

impl Case {
    fn inputs(&self, dtype: Dtype) -> Inputs<Array> {
        let [batch, length, heads, size, value_size] = self.sizes;
        let decay = match self.decay {
            1 => &[heads][..],
            3 => &[batch, length, heads],
            _ => &[batch, length, heads, size],
        };
        let shape = [batch, length, heads, size];
        let unit = |array: Array| -> Array {
            let length = array.square().unwrap().sum_axis(-1, true).unwrap().sqrt().unwrap();
            array.divide(length).unwrap().as_dtype(dtype).unwrap()
        };
        [
            normal(1, &shape, dtype),
            unit(normal(2, &shape, Dtype::Float32)),
            normal(3, &[batch, length, heads, value_size], dtype),
            sigmoid(normal(4, &shape[..3], dtype)).unwrap(),
            normal(5, decay, dtype).abs().unwrap().negative().unwrap(),
            normal(6, &[batch, heads, size, value_size], dtype),
        ]
    }

    fn options<'a>(&self, inputs: &'a [Array]) -> GatedLinearOptions<'a> {
        GatedLinearOptions {
            log_decay: Some(&inputs[4]),
            chunk_size: self.chunk,
            initial_state: Some(&inputs[5]),
            ..Default::default()
        }
    }

    fn run(&self, x: &[Array], options: GatedLinearOptions) -> Result<(Array, Array)> {
        match self.kind {
            Kind::Linear => gated_linear_attention_with_state(&x[0], &x[1], &x[2], options),
            Kind::Delta => gated_delta_rule_with_state(&x[0], &x[1], &x[2], &x[3], options),
        }
    }

    /// The steps in `range`, from `state` on.
    fn part(
        &self,
        inputs: &Inputs<Array>,
        range: std::ops::Range<i32>,
        state: &Array,
    ) -> Inputs<Array> {
        let mut part = inputs.clone();
        let in_time = if self.decay == 1 { 4 } else { 5 };
        for array in &mut part[..in_time] {
            *array = array.try_index((.., range.clone())).unwrap();
        }
        part[5] = state.clone();
        part
    }

    /// The recurrence, a step and a number at a time.
    fn oracle(&self, inputs: &[Tensor]) -> [Tensor; 2] {
        let [queries, keys, values, beta, decay, start] = inputs else { panic!("six inputs") };
        let [batch, length, heads, size] = queries.shape[..] else { panic!("four axes") };
        let value_size = values.shape[3];
        let mut state = start.clone();
        let mut y = vec![0.0; values.values.len()];
        for b in 0..batch {
            for t in 0..length {
                for h in 0..heads {
                    let row = |d: usize| ((b * heads + h) * size + d) * value_size;
                    for d in 0..size {
                        let left = match self.decay {
                            1 => decay.at(&[h]),
                            3 => decay.at(&[b, t, h]),
                            _ => decay.at(&[b, t, h, d]),
                        };
                        let whole = &mut state.values[row(d)..row(d) + value_size];
                        whole.iter_mut().for_each(|number| *number *= left.exp());
                    }
                    for v in 0..value_size {
                        let at = |d: usize| row(d) + v;
                        let found: f64 =
                            (0..size).map(|d| keys.at(&[b, t, h, d]) * state.values[at(d)]).sum();
                        let value = values.at(&[b, t, h, v]);
                        let written = match self.kind {
                            Kind::Linear => value,
                            Kind::Delta => beta.at(&[b, t, h]) * (value - found),
                        };
                        let mut read = 0.0;
                        for d in 0..size {
                            state.values[at(d)] += keys.at(&[b, t, h, d]) * written;
                            read += queries.at(&[b, t, h, d]) * state.values[at(d)];
                        }
                        y[((b * length + t) * heads + h) * value_size + v] =
                            read / (size as f64).sqrt();
                    }
                }
            }
        }
        [Tensor::new(&values.shape, y), state]
    }
}

#[test]
fn results_match_the_oracle() {
    for (number, case) in CASES.iter().enumerate() {
        for dtype in [FLOATING[0], FLOATING[1 + number % 2]] {
            let inputs = case.inputs(dtype);
            let [expected, state] = case.oracle(&inputs.each_ref().map(Tensor::of));
            let op = case.kind.op();
            let run = |dispatch| {
                let options = GatedLinearOptions { dispatch, ..case.options(&inputs) };
                case.run(&inputs, options)
            };
            on_each_backend(op, run, |backend, (y, last)| {
                assert_eq!((y.dtype(), last.dtype()), (dtype, Dtype::Float32));
                let what = format!("{op} {} {dtype:?} {backend}", case.name);
                assert_close(&what, &y, &expected, tolerance(op, backend, dtype));
                let tolerance = tolerance(op, backend, dtype_of_states(backend, dtype));
                assert_close(&format!("{what}: state"), &last, &state, tolerance);
            });
        }
    }
}

/// Only the recurrence: nothing of what may be left out, and a scale that turns it around.
#[test]
fn options_left_out_leave_their_part_out() {
    let case = case("plain", Kind::Linear, [2, 20, 2, 4, 5], 1, 8);
    let inputs = case.inputs(Dtype::Float32);
    let mut tensors = inputs.each_ref().map(Tensor::of);
    tensors[4].values.fill(0.0);
    tensors[5].values.fill(0.0);
    let [mut expected, state] = case.oracle(&tensors);
    // Of keys of length 4 half is taken by default.
    expected.values.iter_mut().for_each(|value| *value *= -3.0);
    let op = case.kind.op();
    let run = |dispatch| {
        let options =
            GatedLinearOptions { scale: Some(-1.5), dispatch, ..GatedLinearOptions::default() };
        case.run(&inputs, options)
    };
    on_each_backend(op, run, |backend, (y, last)| {
        let what = format!("plain {op} on {backend}");
        let tolerance = tolerance(op, backend, Dtype::Float32);
        assert_close(&what, &y, &expected, tolerance);
        assert_close(&format!("{what}: state"), &last, &state, tolerance);
    });
}

/// The kernel's gradient is that of the reference, of the same arrays and options.
#[test]
fn gradients_are_the_same_on_every_backend() {
    let case = case("gradients", Kind::Linear, [1, 7, 2, 2, 3], 3, 4);
    let inputs = case.inputs(Dtype::Float32);
    let run = |inputs: &[Array], dispatch| {
        let options = GatedLinearOptions { scale: Some(0.3), dispatch, ..case.options(inputs) };
        case.run(inputs, options)
    };
    assert_gradients_alike(case.kind.op(), case.name, &inputs, run);
}

#[test]
fn gradients_match_finite_differences() {
    for (kind, decay) in [(Kind::Linear, 3), (Kind::Linear, 4), (Kind::Delta, 3)] {
        let case = case("gradients", kind, [1, 7, 2, 2, 3], decay, 4);
        let inputs = case.inputs(Dtype::Float32).each_ref().map(Tensor::of);
        let joined = |[y, last]: [Tensor; 2]| {
            let values = [y.values, last.values].concat();
            Tensor::new(&[values.len()], values)
        };
        assert_gradients(
            kind.op(),
            &inputs,
            |inputs| joined(case.oracle(inputs)),
            |arrays| {
                let (y, last) = case.run(arrays, case.options(arrays))?;
                Ok(concatenate(&[y.flatten(None, None)?, last.flatten(None, None)?], 0)?)
            },
        );
    }
}

#[test]
fn two_parts_are_the_whole_and_so_are_steps() {
    for case in CASES.iter().filter(|case| case.sizes[1] > 1) {
        let inputs = case.inputs(Dtype::Float32);
        let (expected, last) = case.run(&inputs, case.options(&inputs)).unwrap();
        let [expected, last] = [&expected, &last].map(Tensor::of);
        let (length, tolerance) = (case.sizes[1], Tolerance::here(case.kind.op(), Dtype::Float32));
        for cut in [1, 8, length - 1] {
            let first = case.part(&inputs, 0..cut, &inputs[5]);
            let (left, state) = case.run(&first, case.options(&first)).unwrap();
            let second = case.part(&inputs, cut..length, &state);
            let (right, end) = case.run(&second, case.options(&second)).unwrap();
            let what = format!("{} {} cut at {cut}", case.kind.op(), case.name);
            assert_close(&what, &concatenate(&[left, right], 1).unwrap(), &expected, tolerance);
            assert_close(&what, &end, &last, tolerance);
        }
        let (mut state, mut steps) = (inputs[5].clone(), Vec::new());
        for t in 0..length {
            let at = |which: usize| inputs[which].try_index((.., t)).unwrap();
            let (queries, keys, values, beta) = (at(0), at(1), at(2), at(3));
            let decay = if case.decay == 1 { inputs[4].clone() } else { at(4) };
            let step = GatedLinearStep {
                queries: &queries,
                keys: &keys,
                values: &values,
                log_decay: Some(&decay),
                scale: None,
            };
            let (y, next) = match case.kind {
                Kind::Linear => gated_linear_attention_step(&state, step),
                Kind::Delta => gated_delta_rule_step(&state, step, &beta),
            }
            .unwrap();
            steps.push(y);
            state = next;
        }
        let what = format!("steps of {} {}", case.kind.op(), case.name);
        assert_close(&what, &stack(&steps, 1).unwrap(), &expected, tolerance);
        assert_close(&what, &state, &last, tolerance);
    }
}

#[test]
fn segments_are_runs_of_their_own() {
    for case in CASES.iter().filter(|case| case.sizes[1] == 37) {
        let inputs = case.inputs(Dtype::Float32);
        for bounds in [&[0, 8, 16, 37][..], &[0, 0, 3, 5, 5, 30, 37, 37]] {
            let alone = GatedLinearOptions { initial_state: None, ..case.options(&inputs) };
            let options = GatedLinearOptions { segments: Some(bounds), ..alone };
            let (y, last) = case.run(&inputs, options).unwrap();
            let (mut parts, mut lasts) = (Vec::new(), Vec::new());
            for ends in bounds.windows(2) {
                let part = case.part(&inputs, ends[0]..ends[1], &inputs[5]);
                let options = GatedLinearOptions { initial_state: None, ..case.options(&part) };
                let (y, last) = case.run(&part, options).unwrap();
                parts.push(y);
                lasts.push(last);
            }
            let what = format!("{} {} in {bounds:?}", case.kind.op(), case.name);
            let tolerance = Tolerance::here(case.kind.op(), Dtype::Float32);
            assert_close(&what, &y, &Tensor::of(&concatenate(&parts, 1).unwrap()), tolerance);
            assert_close(&what, &last, &Tensor::of(&stack(&lasts, 1).unwrap()), tolerance);
        }
    }
}

/// Alike keys are the worst that the inverse of a chunk meets: of each value only what is new is written.
#[test]
fn a_value_that_is_stored_again_and_again_stays_itself() {
    let ones = Array::ones::<f32>(&[1, 200, 1, 1]).unwrap();
    let values = normal(1, &[1, 200, 1, 1], Dtype::Float32);
    let beta = Array::ones::<f32>(&[1, 200, 1]).unwrap();
    let y = gated_delta_rule(&ones, &ones, &values, &beta, Default::default()).unwrap();
    assert_close(
        "gated_delta_rule",
        &y,
        &Tensor::of(&values),
        Tolerance::of("gated_delta_rule", Dtype::Float32),
    );
}

#[test]
fn decays_of_any_size_are_stable() {
    for decay in [4, 3] {
        let case = case("extremes", Kind::Linear, [1, 200, 1, 2, 2], decay, 64);
        let mut inputs = case.inputs(Dtype::Float32);
        let count = inputs[4].size();
        let pool = [-1e-6_f32, -90.0, -0.5, f32::NEG_INFINITY, 0.0, -1e30, -1.0];
        let values = (0..count).map(|i| pool[i * i % pool.len()]).collect::<Vec<_>>();
        inputs[4] = Array::from_slice(&values, inputs[4].shape());
        let [expected, _] = case.oracle(&inputs.each_ref().map(Tensor::of));
        let run = |dispatch| {
            let options = GatedLinearOptions { dispatch, ..case.options(&inputs) };
            Ok(case.run(&inputs, options)?.0)
        };
        on_each_backend(case.kind.op(), run, |backend, y| {
            let what = format!("decays along {decay} axes on {backend}");
            let tolerance = Tolerance::of("decays of any size", Dtype::Float32);
            assert_close(&what, &y, &expected, tolerance);
        });
    }
}

#[test]
fn a_retention_has_the_decays_of_its_paper() {
    let decays = Tensor::of(&retention_log_decays(4).unwrap());
    for (head, decay) in decays.values.iter().enumerate() {
        let expected = 1.0 - (-5.0 - head as f64).exp2();
        assert!((decay.exp() - expected).abs() < 1e-7, "{head}: {decay}");
    }
    let message = retention_log_decays(0).unwrap_err().to_string();
    assert_eq!(message, "[retention_log_decays] heads must be at least 1 but got 0");
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let case = case("refused", Kind::Delta, [2, 8, 3, 4, 5], 3, 64);
    let inputs = case.inputs(Dtype::Float32);
    for (which, shape, expected) in [
        (0, &[2, 8, 3][..], "queries must have shape [B, L, H, D] but got [2, 8, 3]"),
        (1, &[2, 8, 3, 5], "keys must have shape [2, 8, 3, 4] but got [2, 8, 3, 5]"),
        (2, &[2, 7, 3, 5], "values must have shape [2, 8, 3, D_v] but got [2, 7, 3, 5]"),
        (3, &[2, 8], "beta must have shape [2, 8, 3] but got [2, 8]"),
        (4, &[2, 8], "log_decay must have shape [2, 8, 3, 4] but got [2, 8]"),
        (4, &[2, 8, 3, 4], "log_decay must have shape [2, 8, 3] but got [2, 8, 3, 4]"),
        (5, &[2, 3, 5, 4], "initial_state must have shape [2, 3, 4, 5] but got [2, 3, 5, 4]"),
    ] {
        let mut changed = inputs.clone();
        changed[which] = normal(1, shape, Dtype::Float32);
        let message = case.run(&changed, case.options(&changed)).unwrap_err().to_string();
        assert_eq!(message, format!("[gated_delta_rule] {expected}"));
    }
    let half = inputs[1].as_dtype(Dtype::Float16).unwrap();
    let message = gated_linear_attention(&inputs[0], half, &inputs[2], Default::default());
    let message = message.unwrap_err().to_string();
    assert_eq!(message, "[gated_linear_attention] keys must have dtype Float32 but got Float16");
    let zero = GatedLinearOptions { chunk_size: 0, ..Default::default() };
    let message = case.run(&inputs, zero).unwrap_err().to_string();
    assert_eq!(message, "[gated_delta_rule] chunk_size must be at least 1 but got 0");
}
