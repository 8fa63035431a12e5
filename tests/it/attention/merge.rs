use mlx_primitives::{
    Error, Layout,
    attention::{FlashAttentionOptions, flash_attention, flash_attention_with_lse, merge_states},
};
use mlx_rs::{Array, Dtype, ops::indexing::TryIndexOp};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    sample::{Random, normal},
    tensor::Tensor,
};

const NONE: f64 = f64::NEG_INFINITY;

/// Outputs `[B, S, H, D]` and log-sum-exps `[B, H, S]`, by turns, to one of each.
fn oracle(states: &[Tensor]) -> [Tensor; 2] {
    let &[_, length, heads, size] = &states[0].shape[..] else { panic!("rank") };
    let lses: Vec<_> = states.iter().skip(1).step_by(2).collect();
    let total_at = |at: &[usize]| lses.iter().map(|lse| lse.at(at).exp()).sum::<f64>();
    let output = Tensor::from_fn(&states[0].shape, |at| {
        let row = [at[0], at[2], at[1]];
        let total = total_at(&row);
        let weighted = states.chunks(2).filter(|state| state[1].at(&row) != NONE);
        weighted.map(|state| state[0].at(at) * state[1].at(&row).exp() / total).sum()
    });
    assert_eq!(lses[0].shape[1..], [heads, length], "{size}");
    [output, Tensor::from_fn(&lses[0].shape, |at| total_at(at).ln())]
}

/// States with rows that one, two or all of them have not seen.
fn states(count: usize, dtype: Dtype) -> Vec<Tensor> {
    let mut random = Random::new(3);
    let state = |which: usize| {
        let output = Tensor::of(&normal(which as u64, &[2, 4, 3, 5], dtype));
        let lse = Tensor::from_fn(&[2, 3, 4], |at| match (at[2], which) {
            (0, _) | (1, 0) => NONE,
            (2, which) if which > 0 => NONE,
            _ => f64::from((3.0 * random.normal()) as f32),
        });
        [output, lse]
    };
    (0..count).flat_map(state).collect()
}

fn in_layout(output: &Array, layout: Layout) -> Array {
    if layout == Layout::Bshd { output.clone() } else { output.swap_axes(1, 2).unwrap() }
}

fn pairs(arrays: &[Array], layout: Layout) -> Vec<(Array, Array)> {
    arrays.chunks(2).map(|state| (in_layout(&state[0], layout), state[1].clone())).collect()
}

#[test]
fn states_are_weighted_by_what_they_saw() {
    for dtype in FLOATING {
        for count in [1, 2, 3, 7] {
            let states = states(count, dtype);
            let arrays: Vec<_> = (0..2 * count)
                .map(|at| states[at].to_array(if at % 2 == 0 { dtype } else { Dtype::Float32 }))
                .collect();
            let [output, lse] = oracle(&states);
            for layout in [Layout::Bshd, Layout::Bhsd] {
                let (got, got_lse) = merge_states(&pairs(&arrays, layout), layout).unwrap();
                assert_eq!(got.dtype(), dtype);
                let what = format!("{count} states of {dtype:?} in {layout:?}");
                let tolerance = Tolerance::of("merge_states", dtype);
                assert_close(&what, &in_layout(&got, layout), &output, tolerance);
                let tolerance = Tolerance::of("merge_states", Dtype::Float32);
                assert_close(&format!("{what}: lse"), &got_lse, &lse, tolerance);
            }
        }
    }
}

#[test]
fn what_saw_nothing_is_not_read() {
    let output = normal(1, &[1, 2, 1, 3], Dtype::Float32);
    let lse = Array::from_slice(&[0.5_f32, -0.5], &[1, 1, 2]);
    let poison = output.multiply(Array::from_f32(f32::NAN)).unwrap();
    let none = Array::from_slice(&[f32::NEG_INFINITY; 2], &[1, 1, 2]);
    let merged = merge_states(&[(poison, none), (output.clone(), lse.clone())], Layout::Bshd);
    let (got, got_lse) = merged.unwrap();
    assert_close("output", &got, &Tensor::of(&output), Tolerance::EXACT);
    assert_close("lse", &got_lse, &Tensor::of(&lse), Tolerance::EXACT);
}

#[test]
fn large_log_sum_exps_stay_finite() {
    let output = normal(1, &[1, 1, 1, 3], Dtype::Float32);
    for lse in [1e4_f32, -1e4] {
        let lse = Array::from_slice(&[lse], &[1, 1, 1]);
        let states = [(output.clone(), lse.clone()), (output.clone(), lse.clone())];
        let (got, got_lse) = merge_states(&states, Layout::Bshd).unwrap();
        assert_close("output", &got, &Tensor::of(&output), Tolerance::EXACT);
        let expected = Tensor::of(&lse.add(Array::from_f32(2_f32.ln())).unwrap());
        assert_close("lse", &got_lse, &expected, Tolerance::EXACT);
    }
}

#[test]
fn gradients_match_finite_differences() {
    let states = states(3, Dtype::Float32);
    let merged = |arrays: &[Array]| merge_states(&pairs(arrays, Layout::Bshd), Layout::Bshd);
    let output = |states: &[Tensor]| oracle(states)[0].clone();
    assert_gradients("output", &states, output, |arrays| Ok(merged(arrays)?.0));
    // Where no state saw a key the log-sum-exp is infinite, and has no differences.
    let finite = |states: &[Tensor]| {
        let lse = &oracle(states)[1];
        let values = lse.values.iter().map(|&value| if value == NONE { 0.0 } else { value });
        Tensor::new(&lse.shape, values.collect())
    };
    assert_gradients("lse", &states, finite, |arrays| {
        let lse = merged(arrays)?.1;
        let none = Array::from_f32(f32::NEG_INFINITY);
        Ok(mlx_rs::ops::select(lse.eq(&none)?, Array::from_f32(0.0), lse)?)
    });
}

/// Keys cut anywhere, some parts empty of what a query sees, merged in any order and in two steps.
#[test]
fn parts_are_the_whole() {
    let mut random = Random::new(7);
    for round in 0..20 {
        let keys = 2 + random.below(40) as i32;
        let queries = 1 + random.below(9) as i32;
        let x = normal(1 + round, &[2, queries, 4, 8], Dtype::Float32);
        let k = normal(100 + round, &[2, keys, 2, 8], Dtype::Float32);
        let mask = normal(200 + round, &[queries, keys], Dtype::Float32);
        let mask = mask.gt(Array::from_f32(1.0)).unwrap();
        let attend = |from: i32, to: i32| {
            let k = k.try_index((.., from..to, .., ..)).unwrap();
            let mask = mask.try_index((.., from..to)).unwrap();
            let options = FlashAttentionOptions { mask: Some(&mask), ..Default::default() };
            flash_attention_with_lse(&x, &k, &k, options).unwrap()
        };
        let mut cuts: Vec<_> =
            (0..random.below(5)).map(|_| random.below(keys as usize) as i32).collect();
        cuts.extend([0, keys]);
        cuts.sort_unstable();
        let mut states: Vec<_> = cuts.windows(2).map(|cut| attend(cut[0], cut[1])).collect();
        for at in (1..states.len()).rev() {
            states.swap(at, random.below(at + 1));
        }
        let first = 1 + random.below(states.len());
        let some = merge_states(&states[..first], Layout::Bshd).unwrap();
        let rest = [&[some], &states[first..]].concat();
        let (got, got_lse) = merge_states(&rest, Layout::Bshd).unwrap();

        let options = FlashAttentionOptions { mask: Some(&mask), ..Default::default() };
        let whole = Tensor::of(&flash_attention(&x, &k, &k, options).unwrap());
        let what = format!("round {round}, cut at {cuts:?}");
        assert_close(&what, &got, &whole, Tolerance::of("merge_states", Dtype::Float32));
        let (_, lse) = attend(0, keys);
        assert_close(
            &what,
            &got_lse,
            &Tensor::of(&lse),
            Tolerance::of("merge_states", Dtype::Float32),
        );
    }
}

#[test]
fn states_that_disagree_are_errors_that_name_the_argument() {
    let zeros = |shape: &[i32]| Array::zeros::<f32>(shape).unwrap();
    let first = (zeros(&[2, 5, 3, 8]), zeros(&[2, 3, 5]));
    let call = |second: (Array, Array)| {
        merge_states(&[first.clone(), second], Layout::Bshd).unwrap_err().to_string()
    };
    let half = first.0.as_dtype(Dtype::Float16).unwrap();
    let half_lse = first.1.as_dtype(Dtype::Float16).unwrap();
    for (message, expected) in [
        (
            merge_states(&[], Layout::Bshd).unwrap_err().to_string(),
            "states must hold one or more but got none",
        ),
        (
            call((zeros(&[2, 5, 3, 7]), first.1.clone())),
            "output must have shape [2, 5, 3, 8] but got [2, 5, 3, 7]",
        ),
        (call((half, first.1.clone())), "output must have dtype Float32 but got Float16"),
        (call((first.0.clone(), half_lse)), "lse must have dtype Float32 but got Float16"),
        (
            call((first.0.clone(), zeros(&[2, 5, 3]))),
            "lse must have shape [2, 3, 5] but got [2, 5, 3]",
        ),
    ] {
        assert_eq!(message, format!("[merge_states] {expected}"));
    }
    let flat = (zeros(&[5, 3, 8]), zeros(&[3, 5]));
    assert!(matches!(
        merge_states(&[flat], Layout::Bhsd),
        Err(Error::Shape { argument: "output", .. })
    ));
    let ints = (first.0.as_dtype(Dtype::Int32).unwrap(), first.1.clone());
    assert!(matches!(
        merge_states(&[ints], Layout::Bshd),
        Err(Error::Dtype { argument: "output", .. })
    ));
}
