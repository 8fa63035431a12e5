//! Tokens that another distribution proposed: what comes of them is the row's own.

use mlx_primitives::{
    Backend, Dispatch, Result,
    sampling::{Conditions, Proposal, Sampled, SamplerBatch, SamplerBatchOptions, SamplingParams},
};
use mlx_rs::{Array, Dtype, ops::broadcast_to};

use super::{
    LOGITS, Text, batch, batch_on,
    draws::{cases, text},
    oracle::probabilities,
    positions_from, rows_of, tokens,
};
use crate::{sampling::assert_follow, support::sample::Random};

const DRAWS: usize = 40_000;
/// Rows of one batch: to make a history for each takes longer than to draw.
const ROWS: usize = 2_000;
/// Every weight a multiple of 1/16, so that f32 holds them: one near what the logits give, one far from it, and one that
/// proposes what may not be drawn as well as too little of what may.
const PROPOSED: [(&str, [f32; 12]); 3] = [
    ("near", [1.0, 0.0, 4.0, 1.0, 2.0, 1.0, 1.0, 0.0, 4.0, 0.0, 0.0, 2.0]),
    ("far", [0.0, 4.0, 0.0, 0.0, 0.0, 1.0, 0.0, 6.0, 0.0, 1.0, 4.0, 0.0]),
    ("one", [0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
];

/// Draws of a distribution in sixteenths.
fn proposals(sixteenths: &[f32; 12], count: usize, random: &mut Random) -> Vec<u32> {
    let draw = |random: &mut Random| {
        let mut left = random.below(16) as f32;
        sixteenths.iter().position(|weight| {
            left -= weight;
            left < 0.0
        })
    };
    (0..count).map(|_| draw(random).unwrap() as u32).collect()
}

fn proposed_rows(sixteenths: &[f32; 12], count: usize) -> Array {
    rows_of(&sixteenths.map(|weight| weight / 16.0), count)
}

fn verify(
    batch: &SamplerBatch,
    logits: Array,
    positions: Array,
    proposal: Proposal,
) -> Result<Sampled> {
    batch.sample_under(
        logits,
        positions,
        &Conditions { proposal: Some(proposal), ..Default::default() },
    )
}

#[test]
fn what_is_proposed_leaves_every_distribution_as_it_is() {
    let logits = LOGITS.map(f64::from);
    let mut random = Random::new(5);
    for (what, params) in cases() {
        let expected = probabilities(&logits, &params, &text());
        let has_coin = params.xtc.is_some();
        let batch = batch(&vec![(params, text()); ROWS], LOGITS.len());
        for (how, sixteenths) in PROPOSED {
            let weights = proposed_rows(&sixteenths, ROWS);
            let (mut drawn, mut kept) = (Vec::new(), 0);
            for round in 0..DRAWS / ROWS {
                let proposed = proposals(&sixteenths, ROWS, &mut random);
                let array = Array::from_slice(&proposed, &[ROWS as i32]);
                let proposal = Proposal { tokens: &array, probabilities: &weights };
                let positions = positions_from(round * ROWS, ROWS);
                let got = verify(&batch, rows_of(&LOGITS, ROWS), positions, proposal).unwrap();
                let got = tokens(&got);
                kept += got.iter().zip(&proposed).filter(|(got, proposed)| got == proposed).count();
                drawn.extend(got);
            }
            assert_follow(&format!("{what}, {how}"), &drawn, &expected);
            // A coin chooses each time by which of two distributions is drawn.
            if !has_coin {
                let common =
                    expected.iter().zip(sixteenths).map(|(p, q)| p.min(f64::from(q) / 16.0));
                let common = common.sum::<f64>();
                let share = kept as f64 / DRAWS as f64;
                let deviation = (common * (1.0 - common) / DRAWS as f64).sqrt();
                assert!((share - common).abs() < 4.0 * deviation + 1e-9, "{what}, {how}: {share}");
            }
        }
    }
}

#[test]
fn rows_that_nothing_is_proposed_to_draw_as_ever() {
    let requests = cases().into_iter().map(|(_, params)| (params, text())).collect::<Vec<_>>();
    let options =
        SamplerBatchOptions { dispatch: Dispatch::Only(Backend::Reference), ..Default::default() };
    let batch = batch_on(&requests, LOGITS.len(), options).unwrap();
    let count = requests.len();
    let nothing = rows_of(&[0.0; 12], count);
    let any = broadcast_to(Array::from_slice(&[3_u32], &[1]), &[count as i32]).unwrap();
    for round in 0..20 {
        let (logits, positions) = (rows_of(&LOGITS, count), positions_from(round * count, count));
        let proposal = Proposal { tokens: &any, probabilities: &nothing };
        let verified = verify(&batch, logits.clone(), positions.clone(), proposal).unwrap();
        let sampled = batch.sample(&logits, &positions).unwrap();
        assert_eq!(tokens(&verified), tokens(&sampled));
        let told = |sampled: &Sampled| sampled.log_probabilities.to_vec_cast::<f32>().unwrap();
        assert_eq!(told(&verified), told(&sampled));
    }
}

#[test]
fn probabilities_are_those_of_the_oracle() {
    let cases = cases().into_iter().filter(|(_, params)| params.xtc.is_none());
    let (names, requests): (Vec<_>, Vec<_>) =
        cases.map(|(what, params)| (what, (params, text()))).unzip();
    let batch = batch(&requests, LOGITS.len());
    let count = requests.len();
    let found = batch.probabilities(rows_of(&LOGITS, count), positions_from(0, count)).unwrap();
    let found = found.to_vec_cast::<f32>().unwrap();
    for ((name, (params, text)), found) in names.iter().zip(&requests).zip(found.chunks(12)) {
        let expected = probabilities(&LOGITS.map(f64::from), params, text);
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{name} {token}: {found}");
        }
    }
}

#[test]
fn what_no_vocabulary_has_is_not_kept() {
    let batch = batch(&vec![(SamplingParams::default(), Text::default()); 200], LOGITS.len());
    // As if token 0 alone were proposed: what is drawn in its place is never it.
    let probabilities =
        proposed_rows(&[16.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 200);
    for (token, may_be_kept) in [(12, false), (1 << 20, false), (u32::MAX, false), (0, true)] {
        let proposed = Array::from_slice(&[token; 200], &[200]);
        let proposal = Proposal { tokens: &proposed, probabilities: &probabilities };
        let drawn =
            verify(&batch, rows_of(&LOGITS, 200), positions_from(0, 200), proposal).unwrap();
        assert_eq!(tokens(&drawn).contains(&0), may_be_kept, "{token}");
    }
}

#[test]
fn what_are_no_probabilities_count_as_none_or_all() {
    let batch = batch(&vec![(SamplingParams::default(), Text::default()); 200], LOGITS.len());
    let token = Array::from_slice(&[4_u32; 200], &[200]);
    let drawn = |number: f32| {
        let numbers = rows_of(&[number; 12], 200);
        let proposal = Proposal { tokens: &token, probabilities: &numbers };
        tokens(&verify(&batch, rows_of(&LOGITS, 200), positions_from(0, 200), proposal).unwrap())
    };
    let (none, all) = (drawn(0.0), drawn(1.0));
    assert_ne!(none, all);
    for number in [f32::NAN, -1.0, f32::NEG_INFINITY] {
        assert_eq!(drawn(number), none, "{number}");
    }
    for number in [f32::INFINITY, 1e30] {
        assert_eq!(drawn(number), all, "{number}");
    }
}

#[test]
fn a_kernel_that_cannot_check_is_refused() {
    let dispatch = Dispatch::Only(Backend::Kernel);
    let options = SamplerBatchOptions { dispatch, ..Default::default() };
    let requests = [(SamplingParams::default(), Text::default())];
    let batch = batch_on(&requests, LOGITS.len(), options).unwrap();
    let (token, numbers) = (Array::from_slice(&[5_u32], &[1]), rows_of(&[0.5; 12], 1));
    let proposal = Proposal { tokens: &token, probabilities: &numbers };
    let refused = verify(&batch, rows_of(&LOGITS, 1), positions_from(0, 1), proposal).unwrap_err();
    let message = "[SamplerBatch] backend kernel is unavailable: no kernel checks proposed tokens";
    assert_eq!(refused.to_string(), message);
}

#[test]
fn where_nothing_can_be_drawn_nothing_is_kept() {
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    let requests = [(greedy, Text::default()), (SamplingParams::default(), Text::default())];
    let batch = batch(&requests, 12);
    let (token, probabilities) =
        (Array::from_slice(&[5_u32; 2], &[2]), rows_of(&[1.0 / 12.0; 12], 2));
    let proposal = Proposal { tokens: &token, probabilities: &probabilities };
    let logits = rows_of(&[f32::NEG_INFINITY; 12], 2);
    let drawn = verify(&batch, logits, positions_from(0, 2), proposal).unwrap();
    assert_eq!(tokens(&drawn), [0, 0]);
}

#[test]
fn proposals_of_other_shapes_are_refused() {
    let batch = batch(&[(SamplingParams::default(), Text::default())], LOGITS.len());
    let (logits, positions) = (rows_of(&LOGITS, 1), positions_from(0, 1));
    let good = (Array::from_slice(&[1_u32], &[1]), rows_of(&[0.5; 12], 1));
    let refusal = |tokens: &Array, probabilities: &Array| {
        let proposal = Proposal { tokens, probabilities };
        verify(&batch, logits.clone(), positions.clone(), proposal).unwrap_err().to_string()
    };
    let two = Array::from_slice(&[1_u32, 2], &[2]);
    assert!(refusal(&two, &good.1).contains("proposal.tokens must have shape"));
    let signed = Array::from_slice(&[1_i32], &[1]);
    assert!(refusal(&signed, &good.1).contains("proposal.tokens must have dtype"));
    assert!(
        refusal(&good.0, &rows_of(&[0.5; 11], 1))
            .contains("proposal.probabilities must have shape")
    );
    let half = good.1.as_dtype(Dtype::Float16).unwrap();
    assert!(refusal(&good.0, &half).contains("proposal.probabilities must have dtype"));
}
