//! What any scan keeps to, for random problems.

use mlx_primitives::{
    Result,
    scan::{ScanOperator, ScanOptions, affine_scan_with_state, associative_scan_with_state},
};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, stack},
};

use super::affine::decays;
use crate::support::{
    compare::{Tolerance, assert_close},
    sample::{Random, normal},
    tensor::Tensor,
};

const OPERATORS: [Option<ScanOperator>; 6] = [
    None,
    Some(ScanOperator::Add),
    Some(ScanOperator::Mul),
    Some(ScanOperator::Max),
    Some(ScanOperator::Min),
    Some(ScanOperator::LogAddExp),
];

/// `[B, L, D]`, scanned along axis 1 by an operator, or affinely.
struct Problem {
    operator: Option<ScanOperator>,
    a: Array,
    x: Array,
    state: Array,
    exclusive: bool,
    reverse: bool,
    random: Random,
}

impl Problem {
    fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let [batch, length, channels] = [3, 70, 5].map(|most| 1 + random.below(most) as i32);
        let shape = [batch, length, channels];
        Self {
            operator: OPERATORS[random.below(OPERATORS.len())],
            a: decays(seed + 1, &shape, Dtype::Float32),
            x: normal(seed + 2, &shape, Dtype::Float32),
            state: normal(seed + 3, &[batch, channels], Dtype::Float32),
            exclusive: random.below(2) == 1,
            reverse: random.below(2) == 1,
            random,
        }
    }

    fn length(&self) -> i32 {
        self.x.dim(1)
    }

    fn options<'a>(&self, state: &'a Array) -> ScanOptions<'a> {
        ScanOptions {
            axis: 1,
            exclusive: self.exclusive,
            reverse: self.reverse,
            initial_state: Some(state),
            ..Default::default()
        }
    }

    fn scan(&self, a: &Array, x: &Array, options: ScanOptions) -> Result<(Array, Array)> {
        match self.operator {
            Some(operator) => associative_scan_with_state(x, operator, options),
            None => affine_scan_with_state(a, x, options),
        }
    }

    fn whole(&self) -> (Array, Array) {
        self.scan(&self.a, &self.x, self.options(&self.state)).unwrap()
    }

    fn part(&self, from: i32, to: i32, state: &Array) -> (Array, Array) {
        let [a, x] = [&self.a, &self.x].map(|array| array.try_index((.., from..to)).unwrap());
        self.scan(&a, &x, self.options(state)).unwrap()
    }
}

fn assert_same(what: &str, got: &Array, expected: &Array) {
    let tolerance = Tolerance::of("affine_scan", Dtype::Float32);
    assert_close(what, got, &Tensor::of(expected), tolerance);
}

#[test]
fn a_scan_in_two_parts_is_the_whole() {
    for seed in 0..60 {
        let mut problem = Problem::random(10 * seed);
        let cut = problem.random.below(problem.length() as usize + 1) as i32;
        let ((first, last), y) = if problem.reverse {
            let (right, state) = problem.part(cut, problem.length(), &problem.state);
            let (left, last) = problem.part(0, cut, &state);
            ((left, last), right)
        } else {
            let (left, state) = problem.part(0, cut, &problem.state);
            let (right, last) = problem.part(cut, problem.length(), &state);
            ((left, last), right)
        };
        let (expected, expected_last) = problem.whole();
        let y = concatenate(&[first, y], 1).unwrap();
        let what = format!("seed {seed}, {:?} cut at {cut}", problem.operator);
        assert_same(&what, &y, &expected);
        assert_same(&format!("{what}: state"), &last, &expected_last);
    }
}

#[test]
fn a_scan_backwards_is_a_scan_of_what_is_turned_round() {
    for seed in 0..60 {
        let problem = Problem::random(10 * seed);
        // Not by a view: MLX's CPU back end mistakes some reversed ones for contiguous.
        let backwards = (0..problem.length()).rev().collect::<Vec<_>>();
        let backwards = Array::from_slice(&backwards, &[problem.length()]);
        let turned = |array: &Array| array.take_axis(&backwards, 1).unwrap();
        let options = ScanOptions { reverse: !problem.reverse, ..problem.options(&problem.state) };
        let (y, last) = problem.scan(&turned(&problem.a), &turned(&problem.x), options).unwrap();
        let (expected, expected_last) = problem.whole();
        let what = format!("seed {seed}, {:?}", problem.operator);
        assert_same(&what, &turned(&y), &expected);
        assert_same(&format!("{what}: state"), &last, &expected_last);
    }
}

#[test]
fn segments_are_scans_of_their_own() {
    for seed in 0..40 {
        let mut problem = Problem::random(10 * seed);
        let length = problem.length();
        let mut bounds = vec![0, length];
        for _ in 0..problem.random.below(5) {
            bounds.push(problem.random.below(length as usize + 1) as i32);
        }
        bounds.sort_unstable();
        let state_of = |n: i32| problem.state.add(Array::from_f32(n as f32)).unwrap();
        let parts = bounds
            .windows(2)
            .enumerate()
            .map(|(n, ends)| problem.part(ends[0], ends[1], &state_of(n as i32)));
        let (parts, lasts): (Vec<_>, Vec<_>) = parts.unzip();
        let states = (0..bounds.len() as i32 - 1).map(state_of).collect::<Vec<_>>();
        let states = stack(&states, 1).unwrap();
        let options = ScanOptions { segments: Some(&bounds), ..problem.options(&states) };
        let (y, last) = problem.scan(&problem.a, &problem.x, options).unwrap();
        let what = format!("seed {seed}, {:?} in {bounds:?}", problem.operator);
        assert_same(&what, &y, &concatenate(&parts, 1).unwrap());
        assert_same(&format!("{what}: states"), &last, &stack(&lasts, 1).unwrap());
    }
}

#[test]
fn an_exclusive_scan_is_the_other_shifted() {
    for seed in 0..30 {
        let problem = Problem { exclusive: true, reverse: false, ..Problem::random(10 * seed) };
        let (y, last) = problem.whole();
        let inclusive = ScanOptions { exclusive: false, ..problem.options(&problem.state) };
        let (all, end) = problem.scan(&problem.a, &problem.x, inclusive).unwrap();
        let start = problem.state.expand_dims(1).unwrap();
        let shifted = concatenate(&[start, all.try_index((.., ..-1)).unwrap()], 1).unwrap();
        let what = format!("seed {seed}, {:?}", problem.operator);
        assert_same(&what, &y, &shifted);
        assert_same(&format!("{what}: state"), &last, &end);
    }
}
