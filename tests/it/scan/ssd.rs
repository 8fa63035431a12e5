use mlx_primitives::{
    Result,
    scan::{SsdInput, SsdOptions, SsdStep, ssd_scan, ssd_scan_with_state, ssd_step},
};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, stack},
};

use super::dtype_of_states;
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "ssd_scan";

/// `x`, `dt`, `a`, `b`, `c`, `d`, `z`, `dt_bias`, and the initial state.
type Inputs<T> = [T; 9];

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// `B`, `L`, `H`, `P`, `G`, `N`
    sizes: [i32; 6],
    chunk: i32,
}

const fn case(name: &'static str, sizes: [i32; 6], chunk: i32) -> Case {
    Case { name, sizes, chunk }
}

const CASES: &[Case] = &[
    case("one step", [2, 1, 2, 3, 1, 4], 64),
    case("a part of a chunk", [1, 7, 2, 3, 2, 4], 64),
    case("whole chunks", [2, 32, 4, 5, 2, 3], 16),
    case("one step more", [1, 33, 4, 3, 1, 8], 16),
    case("chunks of one step", [1, 5, 2, 2, 1, 2], 1),
    case("many chunks", [1, 130, 2, 4, 1, 4], 8),
];

impl Case {
    fn inputs(&self, dtype: Dtype) -> Inputs<Array> {
        let [batch, length, heads, size, groups, state] = self.sizes;
        let keys = [batch, length, groups, state];
        let shapes: Inputs<&[i32]> = [
            &[batch, length, heads, size],
            &[batch, length, heads],
            &[heads],
            &keys,
            &keys,
            &[heads],
            &[batch, length, heads, size],
            &[heads],
            &[batch, heads, size, state],
        ];
        let mut seed = 0;
        let mut inputs = shapes.map(|shape| {
            seed += 1;
            normal(seed, shape, dtype)
        });
        inputs[2] = inputs[2].abs().unwrap().negative().unwrap();
        inputs
    }

    fn options<'a>(&self, inputs: &'a [Array]) -> SsdOptions<'a> {
        SsdOptions {
            chunk_size: self.chunk,
            d: Some(&inputs[5]),
            z: Some(&inputs[6]),
            dt_bias: Some(&inputs[7]),
            dt_softplus: true,
            initial_state: Some(&inputs[8]),
            ..Default::default()
        }
    }
}

fn input(inputs: &[Array]) -> SsdInput<'_> {
    SsdInput { x: &inputs[0], dt: &inputs[1], a: &inputs[2], b: &inputs[3], c: &inputs[4] }
}

/// The recurrence, a step and a number at a time.
fn oracle(inputs: &[Tensor]) -> [Tensor; 2] {
    let [x, dt, a, b, c, d, z, bias, start] = inputs else { panic!("nine inputs") };
    let [batch, length, heads, size] = x.shape[..] else { panic!("four axes") };
    let (groups, width) = (b.shape[2], b.shape[3]);
    let mut state = start.clone();
    let mut y = Tensor::new(&x.shape, vec![0.0; x.values.len()]);
    for n in 0..batch {
        for t in 0..length {
            for h in 0..heads {
                let group = h / (heads / groups);
                let step = (dt.at(&[n, t, h]) + bias.at(&[h])).exp().ln_1p();
                for p in 0..size {
                    let mut read = 0.0;
                    for s in 0..width {
                        let at = ((n * heads + h) * size + p) * width + s;
                        let added = step * x.at(&[n, t, h, p]) * b.at(&[n, t, group, s]);
                        state.values[at] = (step * a.at(&[h])).exp() * state.values[at] + added;
                        read += state.values[at] * c.at(&[n, t, group, s]);
                    }
                    let gate = z.at(&[n, t, h, p]);
                    let skipped = read + d.at(&[h]) * x.at(&[n, t, h, p]);
                    y.values[((n * length + t) * heads + h) * size + p] =
                        skipped * gate / (1.0 + (-gate).exp());
                }
            }
        }
    }
    [y, state]
}

#[test]
fn results_match_the_oracle() {
    for (number, case) in CASES.iter().enumerate() {
        for dtype in [FLOATING[0], FLOATING[1 + number % 2]] {
            let inputs = case.inputs(dtype);
            let tensors = inputs.each_ref().map(Tensor::of);
            let [expected, state] = oracle(&tensors);
            let options = case.options(&inputs);
            let (y, last) = ssd_scan_with_state(input(&inputs), options).unwrap();
            assert_eq!((y.dtype(), last.dtype()), (dtype, Dtype::Float32));
            let what = format!("{OP} {} {dtype:?}", case.name);
            assert_close(&what, &y, &expected, Tolerance::here(OP, dtype));
            let tolerance = Tolerance::here(OP, dtype_of_states(dtype));
            assert_close(&format!("{what}: state"), &last, &state, tolerance);
        }
    }
}

/// Only the recurrence: nothing of what may be left out.
#[test]
fn options_left_out_leave_their_part_out() {
    let inputs = CASES[2].inputs(Dtype::Float32);
    let mut tensors = inputs.each_ref().map(Tensor::of);
    let dt = inputs[1].abs().unwrap();
    // The softplus of this is dt.
    tensors[1] = Tensor::of(&dt);
    tensors[1].values.iter_mut().for_each(|value| *value = value.exp_m1().ln());
    tensors[5].values.fill(0.0);
    tensors[7].values.fill(0.0);
    tensors[8].values.fill(0.0);
    // silu(1.278464542761074) is 1.
    tensors[6].values.fill(1.278_464_542_761_074);
    let [expected, _] = oracle(&tensors);
    let y = ssd_scan(SsdInput { dt: &dt, ..input(&inputs) }, SsdOptions::default()).unwrap();
    assert_close("plain ssd_scan", &y, &expected, Tolerance::here(OP, Dtype::Float32));
}

#[test]
fn gradients_match_finite_differences() {
    let case = case("gradients", [1, 7, 2, 2, 1, 3], 3);
    let inputs = case.inputs(Dtype::Float32).each_ref().map(Tensor::of);
    let joined = |[y, last]: [Tensor; 2]| {
        let values = [y.values, last.values].concat();
        Tensor::new(&[values.len()], values)
    };
    assert_gradients(
        OP,
        &inputs,
        |inputs| joined(oracle(inputs)),
        |arrays| {
            let (y, last) = ssd_scan_with_state(input(arrays), case.options(arrays))?;
            Ok(concatenate(&[y.flatten(None, None)?, last.flatten(None, None)?], 0)?)
        },
    );
}

fn part(
    inputs: &Inputs<Array>,
    range: std::ops::Range<i32>,
    state: Option<&Array>,
) -> Inputs<Array> {
    let mut part = inputs.clone();
    for which in [0, 1, 3, 4, 6] {
        part[which] = inputs[which].try_index((.., range.clone())).unwrap();
    }
    if let Some(state) = state {
        part[8] = state.clone();
    }
    part
}

#[test]
fn a_scan_in_two_parts_is_the_whole_and_so_are_steps() {
    let case = case("parts", [2, 37, 4, 3, 2, 5], 8);
    let inputs = case.inputs(Dtype::Float32);
    let (expected, last) = ssd_scan_with_state(input(&inputs), case.options(&inputs)).unwrap();
    for cut in [1, 8, 20, 36] {
        let first = part(&inputs, 0..cut, None);
        let (left, state) = ssd_scan_with_state(input(&first), case.options(&first)).unwrap();
        let second = part(&inputs, cut..37, Some(&state));
        let (right, end) = ssd_scan_with_state(input(&second), case.options(&second)).unwrap();
        let y = concatenate(&[left, right], 1).unwrap();
        let what = format!("{OP} cut at {cut}");
        let tolerance = Tolerance::here(OP, Dtype::Float32);
        assert_close(&what, &y, &Tensor::of(&expected), tolerance);
        assert_close(&what, &end, &Tensor::of(&last), tolerance);
    }
    let mut state = inputs[8].clone();
    let mut steps = Vec::new();
    for t in 0..37 {
        let at = |which: usize| inputs[which].try_index((.., t)).unwrap();
        let (x, dt, b, c, z) = (at(0), at(1), at(3), at(4), at(6));
        let step = SsdStep { x: &x, dt: &dt, a: &inputs[2], b: &b, c: &c };
        let options = SsdOptions { z: Some(&z), initial_state: None, ..case.options(&inputs) };
        let (y, next) = ssd_step(&state, step, options).unwrap();
        steps.push(y);
        state = next;
    }
    let tolerance = Tolerance::here(OP, Dtype::Float32);
    assert_close("steps", &stack(&steps, 1).unwrap(), &Tensor::of(&expected), tolerance);
    assert_close("steps: state", &state, &Tensor::of(&last), tolerance);
}

#[test]
fn segments_are_scans_of_their_own() {
    let case = case("segments", [2, 37, 4, 3, 2, 5], 8);
    let inputs = case.inputs(Dtype::Float32);
    for bounds in [&[0, 37][..], &[0, 8, 16, 37], &[0, 0, 3, 5, 5, 30, 37, 37], &[0, 1, 36, 37]] {
        let options =
            SsdOptions { initial_state: None, segments: Some(bounds), ..case.options(&inputs) };
        let (y, last) = ssd_scan_with_state(input(&inputs), options).unwrap();
        let (mut parts, mut lasts) = (Vec::new(), Vec::new());
        for ends in bounds.windows(2) {
            let part = part(&inputs, ends[0]..ends[1], None);
            let options = SsdOptions { initial_state: None, ..case.options(&part) };
            let (y, last) = ssd_scan_with_state(input(&part), options).unwrap();
            parts.push(y);
            lasts.push(last);
        }
        let what = format!("{OP} in {bounds:?}");
        let tolerance = Tolerance::here(OP, Dtype::Float32);
        assert_close(&what, &y, &Tensor::of(&concatenate(&parts, 1).unwrap()), tolerance);
        assert_close(&what, &last, &Tensor::of(&stack(&lasts, 1).unwrap()), tolerance);
    }
}

#[test]
fn decays_near_one_and_zero_are_stable_over_a_long_sequence() {
    let length = 16384;
    let case = case("long", [1, length, 2, 2, 1, 2], 64);
    let mut inputs = case.inputs(Dtype::Float32);
    inputs[2] = Array::from_slice(&[-1e-4_f32, -50.0], &[2]);
    let tensors = inputs.each_ref().map(Tensor::of);
    let [expected, _] = oracle(&tensors);
    let y = ssd_scan(input(&inputs), case.options(&inputs)).unwrap();
    assert_close("long ssd_scan", &y, &expected, Tolerance::of("ssd_scan, long", Dtype::Float32));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let inputs = CASES[2].inputs(Dtype::Float32);
    let refused = |which: usize, array: Array| -> String {
        let mut changed = inputs.clone();
        changed[which] = array;
        ssd_scan(input(&changed), CASES[2].options(&changed)).unwrap_err().to_string()
    };
    let array = |shape: &[i32]| normal(1, shape, Dtype::Float32);
    for (which, shape, expected) in [
        (0, &[2, 32, 4][..], "x must have shape [B, L, H, P] but got [2, 32, 4]"),
        (1, &[2, 32, 5], "dt must have shape [2, 32, 4] but got [2, 32, 5]"),
        (2, &[5], "a must have shape [4] but got [5]"),
        (3, &[2, 31, 2, 3], "b must have shape [2, 32, G, N] but got [2, 31, 2, 3]"),
        (4, &[2, 32, 2, 4], "c must have shape [2, 32, 2, 3] but got [2, 32, 2, 4]"),
        (5, &[5], "d must have shape [4] but got [5]"),
        (6, &[2, 32, 4, 4], "z must have shape [2, 32, 4, 5] but got [2, 32, 4, 4]"),
        (7, &[4, 1], "dt_bias must have shape [4] but got [4, 1]"),
        (8, &[2, 4, 3, 5], "initial_state must have shape [2, 4, 5, 3] but got [2, 4, 3, 5]"),
    ] {
        assert_eq!(refused(which, array(shape)), format!("[ssd_scan] {expected}"));
    }
    let mut three = inputs.clone();
    three[3] = array(&[2, 32, 3, 3]);
    three[4] = three[3].clone();
    let message = ssd_scan(input(&three), SsdOptions::default()).unwrap_err().to_string();
    assert_eq!(message, "[ssd_scan] b must have groups that divide the 4 heads but got 3");
    let ask = |options| -> Result<Array> { ssd_scan(input(&inputs), options) };
    let zero = SsdOptions { chunk_size: 0, ..Default::default() };
    let message = ask(zero).unwrap_err().to_string();
    assert_eq!(message, "[ssd_scan] chunk_size must be at least 1 but got 0");
    let short = SsdOptions { segments: Some(&[0, 31]), ..Default::default() };
    let message = ask(short).unwrap_err().to_string();
    assert_eq!(message, "[ssd_scan] segments must end at L = 32 but got 31");
    let both = SsdOptions { segments: Some(&[0, 32]), ..CASES[2].options(&inputs) };
    let message = ask(both).unwrap_err().to_string();
    assert!(message.starts_with("[ssd_scan] initial_state must be none where there are segments"));
}

#[test]
fn nothing_to_scan_leaves_the_state() {
    let case = case("nothing", [2, 0, 2, 3, 1, 4], 64);
    let inputs = case.inputs(Dtype::Float32);
    let (y, last) = ssd_scan_with_state(input(&inputs), case.options(&inputs)).unwrap();
    assert_eq!(y.shape(), [2, 0, 2, 3]);
    assert_close("state", &last, &Tensor::of(&inputs[8]), Tolerance::EXACT);
    let options = |segments| SsdOptions { segments: Some(segments), ..Default::default() };
    for (segments, count) in [(&[0][..], 0), (&[0, 0, 0], 2)] {
        let (_, last) = ssd_scan_with_state(input(&inputs), options(segments)).unwrap();
        assert_eq!(last.shape(), [2, count, 2, 3, 4]);
    }
}
