use mlx_primitives::{
    Backend, Dispatch, Result,
    scan::{SsdInput, SsdOptions, SsdStep, ssd_scan, ssd_scan_with_state, ssd_step},
};
use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, concatenate, indexing::TryIndexOp, stack},
};

use super::{assert_gradients_alike, dtype_of_states, tolerance};
use crate::support::{
    FLOATING,
    backends::{on_backends, on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    host,
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
    case("more rows than a group has, keys of odd length", [1, 70, 2, 70, 1, 37], 32),
    case("whole tiles", [1, 65, 2, 64, 1, 16], 64),
    case("keys of 128", [1, 33, 2, 16, 1, 128], 64),
    case("keys of 192", [1, 33, 1, 16, 1, 192], 64),
    case("keys of 256", [1, 33, 1, 16, 1, 256], 64),
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
        // What queries find in keys is about one, however long they are.
        let scale = Array::from_f32((state as f32).powf(-0.25));
        for which in [3, 4] {
            let scaled = normal(which as u64 + 1, &keys, Dtype::Float32).multiply(&scale);
            inputs[which] = scaled.unwrap().as_dtype(dtype).unwrap();
        }
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
            let run = |dispatch| {
                let options = SsdOptions { dispatch, ..case.options(&inputs) };
                ssd_scan_with_state(input(&inputs), options)
            };
            on_each_backend(OP, run, |backend, (y, last)| {
                assert_eq!((y.dtype(), last.dtype()), (dtype, Dtype::Float32));
                let what = format!("{OP} {} {dtype:?} {backend}", case.name);
                assert_close(&what, &y, &expected, tolerance(OP, backend, dtype));
                let tolerance = tolerance(OP, backend, dtype_of_states(backend, dtype));
                assert_close(&format!("{what}: state"), &last, &state, tolerance);
            });
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
    let run = |dispatch| {
        let options = SsdOptions { dispatch, ..Default::default() };
        ssd_scan(SsdInput { dt: &dt, ..input(&inputs) }, options)
    };
    on_each_backend(OP, run, |backend, y| {
        let what = format!("plain ssd_scan on {backend}");
        assert_close(&what, &y, &expected, tolerance(OP, backend, Dtype::Float32));
    });
}

#[test]
fn a_skip_may_be_of_each_element() {
    let case = CASES[2];
    let inputs = case.inputs(Dtype::Float32);
    let [_, _, heads, size, ..] = case.sizes;
    let spread = broadcast_to(inputs[5].expand_dims(-1).unwrap(), &[heads, size]).unwrap();
    let run = |dispatch, d| {
        ssd_scan(input(&inputs), SsdOptions { d: Some(d), dispatch, ..case.options(&inputs) })
    };
    on_each_backend(
        OP,
        |dispatch| Ok([run(dispatch, &inputs[5])?, run(dispatch, &spread)?]),
        |backend, [of_heads, of_elements]| {
            let what = format!("{OP} on {backend}");
            assert_close(&what, &of_elements, &Tensor::of(&of_heads), Tolerance::EXACT);
        },
    );
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

/// The kernel's gradient is that of the reference, of the same arrays and options.
#[test]
fn gradients_are_the_same_on_every_backend() {
    let case = case("gradients", [1, 7, 2, 2, 1, 3], 3);
    let inputs = case.inputs(Dtype::Float32);
    let run = |inputs: &[Array], dispatch| {
        let options = SsdOptions { dispatch, dt_limit: Some((0.1, 1.5)), ..case.options(inputs) };
        ssd_scan_with_state(input(inputs), options)
    };
    assert_gradients_alike(OP, case.name, &inputs, run);
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
    assert_stable(16384, with_kernels(false));
    assert_stable(2048, with_kernels(true));
}

fn assert_stable(length: i32, backends: &[Backend]) {
    let case = case("long", [1, length, 2, 2, 1, 2], 64);
    let mut inputs = case.inputs(Dtype::Float32);
    inputs[2] = Array::from_slice(&[-1e-4_f32, -50.0], &[2]);
    let tensors = inputs.each_ref().map(Tensor::of);
    let [expected, _] = oracle(&tensors);
    let run = |dispatch| {
        let options = SsdOptions { dispatch, ..case.options(&inputs) };
        ssd_scan(input(&inputs), options)
    };
    on_backends(backends, OP, run, |backend, y| {
        let tolerance = Tolerance::of("ssd_scan, long", Dtype::Float32);
        assert_close(&format!("long ssd_scan on {backend}"), &y, &expected, tolerance);
    });
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
    host::install();
    for (segments, reason) in [
        (Some(&[0, 32][..]), "the kernel knows no segments"),
        (None, "the kernel takes keys of at most 256 elements"),
    ] {
        let mut wide = inputs.clone();
        if segments.is_none() {
            (wide[3], wide[4]) = (array(&[2, 32, 2, 257]), array(&[2, 32, 2, 257]));
        }
        let dispatch = Dispatch::Only(Backend::Kernel);
        let options = SsdOptions { segments, dispatch, ..Default::default() };
        let message = ssd_scan(input(&wide), options).unwrap_err().to_string();
        assert!(message.ends_with(reason), "{message}");
    }
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
