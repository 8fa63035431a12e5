//! The formulas against values worked out from the papers in 40-digit decimal arithmetic.

use super::{super::YarnRamp, *};

/// A model of these many dims and this base, for a sequence of this length.
type Model = (i32, f32, i32);

const TINY: Model = (8, 10_000.0, 1);
const LLAMA_2: Model = (128, 10_000.0, 1);

fn frequencies(scaling: &RopeScaling, (dims, base, length): Model) -> Option<RopeFrequencies> {
    scaling.frequencies(dims, base, length).ok()
}

#[track_caller]
fn assert_inverse(scaling: &RopeScaling, model: Model, expected: &[(usize, f64)]) {
    let inverse =
        frequencies(scaling, model).map(|frequencies| frequencies.inverse).unwrap_or_default();
    assert_eq!(inverse.len() as i32, model.0 / 2);
    for &(pair, expected) in expected {
        let error = (inverse[pair] / expected - 1.0).abs();
        assert!(error < 1e-12, "{scaling:?}: pair {pair} is {} not {expected}", inverse[pair]);
    }
}

#[track_caller]
fn assert_magnitude(scaling: &RopeScaling, expected: f64) {
    let found = frequencies(scaling, TINY).map(|frequencies| frequencies.magnitude);
    assert!(found.is_some_and(|found| (found - expected).abs() < 1e-12), "{scaling:?}: {found:?}");
}

#[track_caller]
fn assert_refused(scaling: &RopeScaling, (dims, base, length): Model, message: &str) {
    let refusal = scaling.frequencies(dims, base, length).err().map(|error| error.to_string());
    assert_eq!(refusal.as_deref(), Some(message), "{scaling:?}");
}

#[test]
fn no_scaling_is_the_powers_of_the_base() {
    let expected = [(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.001)];
    assert_inverse(&RopeScaling::None, TINY, &expected);
    let expected = [(1, 0.316_227_766_016_837_94), (3, 0.031_622_776_601_683_79)];
    assert_inverse(&RopeScaling::None, (8, 100.0, 1), &expected);
    assert_magnitude(&RopeScaling::None, 1.0);
}

#[test]
fn linear_divides() {
    let scaling = RopeScaling::Linear { factor: 4.0 };
    assert_inverse(&scaling, TINY, &[(0, 0.25), (1, 0.025), (3, 0.000_25)]);
    assert_magnitude(&scaling, 1.0);
}

#[test]
fn ntk_keeps_the_first_pair_and_divides_the_last() {
    let scaling = RopeScaling::Ntk { factor: 4.0 };
    let expected =
        [(0, 1.0), (1, 0.062_996_052_494_743_66), (2, 0.003_968_502_629_920_499), (3, 0.000_25)];
    assert_inverse(&scaling, TINY, &expected);
    assert_inverse(&scaling, (2, 10_000.0, 1), &[(0, 1.0)]);
}

#[test]
fn dynamic_ntk_starts_past_the_length_trained_on() {
    let scaling = RopeScaling::DynamicNtk { factor: 2.0, original_max_positions: 2048 };
    for length in [0, 1, 2048] {
        assert_inverse(&scaling, (8, 10_000.0, length), &[(1, 0.1), (3, 0.001)]);
    }
    let expected =
        [(0, 1.0), (1, 0.058_480_354_764_257_32), (2, 0.003_419_951_893_353_394), (3, 0.000_2)];
    assert_inverse(&scaling, (8, 10_000.0, 6144), &expected);
    assert_inverse(&scaling, (2, 10_000.0, 6144), &[(0, 1.0)]);
}

const LLAMA_3: RopeScaling = RopeScaling::Llama3 {
    factor: 8.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_positions: 8192,
};

#[test]
fn llama_3_blends_by_wavelength() {
    let expected = [
        (0, 1.0),
        (1, 0.814_617_233_856_544_7),
        (28, 0.003_211_445_994_752_591),
        (29, 0.002_166_570_763_503_358_7),
        (31, 0.000_856_751_412_919_632_1),
        (34, 0.000_178_507_812_767_996_4),
        (35, 9.556_212_353_964_683e-5),
        (63, 3.068_925_988_914_511e-7),
    ];
    assert_inverse(&LLAMA_3, (128, 500_000.0, 1), &expected);
    assert_magnitude(&LLAMA_3, 1.0);
}

/// Llama 2 stretched from 4096 to 16384 positions.
fn yarn(ramp: YarnRamp) -> RopeScaling {
    RopeScaling::Yarn(Yarn { ramp, ..Yarn::new(4.0, 4096) })
}

#[test]
fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
    let ends = [
        (0, 1.0),
        (20, 0.056_234_132_519_034_91),
        (46, 0.000_333_380_358_040_831),
        (63, 2.886_954_961_723_645_5e-5),
    ];
    for ramp in [YarnRamp::WholePairs, YarnRamp::Pairs, YarnRamp::Turns] {
        assert_inverse(&yarn(ramp), LLAMA_2, &ends);
    }
}

#[test]
fn yarn_ramps_between_as_asked() {
    for (ramp, expected) in [
        (
            YarnRamp::WholePairs,
            [
                (21, 0.047_292_038_501_684_786),
                (31, 0.007_883_607_780_091_494),
                (45, 0.000_429_402_588_997_358_3),
            ],
        ),
        (
            YarnRamp::Pairs,
            [
                (21, 0.048_612_555_193_470_15),
                (31, 0.007_931_507_216_573_014),
                (45, 0.000_386_270_804_949_782_4),
            ],
        ),
        (
            YarnRamp::Turns,
            [
                (21, 0.048_396_733_875_330_306),
                (31, 0.004_710_767_749_085_775),
                (45, 0.000_385_126_037_578_567_06),
            ],
        ),
    ] {
        assert_inverse(&yarn(ramp), LLAMA_2, &expected);
    }
    assert_eq!(yarn(YarnRamp::default()), RopeScaling::Yarn(Yarn::new(4.0, 4096)));
}

#[test]
fn yarn_matches_gpt_oss() {
    let yarn = Yarn { ramp: YarnRamp::Pairs, ..Yarn::new(32.0, 4096) };
    let expected = [
        (8, 0.050_813_274_815_461_475),
        (9, 0.031_705_696_184_663_77),
        (17, 0.000_129_318_701_245_062_73),
        (18, 3.830_881_237_375_338_4e-5),
    ];
    assert_inverse(&RopeScaling::Yarn(yarn), (64, 150_000.0, 1), &expected);
}

#[test]
fn a_yarn_ramp_outside_the_pairs_is_cut() {
    let expected = [(0, 1.0), (1, 0.062_5), (2, 0.002_5), (3, 0.000_25)];
    assert_inverse(&RopeScaling::Yarn(Yarn::new(4.0, 64)), TINY, &expected);
    // No pair turns even once in one position: all are interpolated, the first included.
    let ended = RopeScaling::Yarn(Yarn { ramp: YarnRamp::Turns, ..Yarn::new(4.0, 1) });
    assert_inverse(&ended, TINY, &[(0, 0.25), (3, 0.000_25)]);
}

#[test]
fn yarn_has_a_temperature() {
    let yarn = Yarn::new(4.0, 4096);
    for (yarn, expected) in [
        (yarn, 1.138_629_436_111_989),
        (Yarn { factor: 0.5, ..yarn }, 1.0),
        (Yarn { mscale: 0.5, mscale_all_dims: 0.5, ..yarn }, 1.0),
        (Yarn { factor: 40.0, mscale_all_dims: 0.5, ..yarn }, 1.155_721_990_196_261),
        (Yarn { attention_factor: Some(1.25), ..yarn }, 1.25),
    ] {
        assert_magnitude(&RopeScaling::Yarn(yarn), expected);
    }
}

const LONG_FACTOR: [f32; 4] = [1.0, 2.0, 4.0, 8.0];

fn long_rope(long_factor: &[f32]) -> RopeScaling {
    RopeScaling::LongRope {
        short_factor: vec![1.0; 4],
        long_factor: long_factor.to_vec(),
        original_max_positions: 4096,
        max_positions: 131_072,
    }
}

#[test]
fn long_rope_divides_by_the_list_for_the_length() {
    assert_inverse(
        &long_rope(&LONG_FACTOR),
        (8, 10_000.0, 4096),
        &[(1, 0.1), (2, 0.01), (3, 0.001)],
    );
    let long = [(0, 1.0), (1, 0.05), (2, 0.002_5), (3, 0.000_125)];
    assert_inverse(&long_rope(&LONG_FACTOR), (8, 10_000.0, 4097), &long);
    assert_magnitude(&long_rope(&LONG_FACTOR), 1.190_238_071_423_808_3);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |scaling: RopeScaling, message: &str| assert_refused(&scaling, TINY, message);
    for factor in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = format!("[RopeScaling] factor must be finite and above 0 but got {factor}");
        refused(RopeScaling::Linear { factor }, &message);
        refused(RopeScaling::Ntk { factor }, &message);
        refused(RopeScaling::DynamicNtk { factor, original_max_positions: 1 }, &message);
        refused(RopeScaling::Yarn(Yarn::new(factor, 1)), &message);
    }
    refused(
        RopeScaling::DynamicNtk { factor: 1.0, original_max_positions: 0 },
        "[RopeScaling] original_max_positions must be at least 1 but got 0",
    );
    refused(
        RopeScaling::Llama3 {
            factor: 1.0,
            low_freq_factor: 4.0,
            high_freq_factor: 4.0,
            original_max_positions: 1,
        },
        "[RopeScaling] high_freq_factor must be finite and above 4 but got 4",
    );
    refused(
        RopeScaling::Yarn(Yarn { beta_fast: 0.5, ..Yarn::new(1.0, 1) }),
        "[RopeScaling] beta_fast must be finite and above 1 but got 0.5",
    );
    refused(
        RopeScaling::Yarn(Yarn { attention_factor: Some(f32::NAN), ..Yarn::new(1.0, 1) }),
        "[RopeScaling] attention_factor must be finite and above 0 but got NaN",
    );
}

#[test]
fn a_list_of_factors_has_one_for_each_pair() {
    assert_refused(
        &long_rope(&LONG_FACTOR),
        (16, 10_000.0, 1),
        "[RopeScaling] short_factor must hold dims/2 = 8 numbers but got 4",
    );
    assert_refused(
        &long_rope(&[1.0, 1.0, 0.0, 1.0]),
        TINY,
        "[RopeScaling] long_factor must be finite and above 0 but got 0",
    );
}

#[test]
fn every_scaling_needs_pairs_and_a_base() {
    for scaling in [RopeScaling::None, LLAMA_3, yarn(YarnRamp::Turns), long_rope(&LONG_FACTOR)] {
        let refused = |dims, base, message| assert_refused(&scaling, (dims, base, 1), message);
        refused(0, 1e4, "[RopeScaling] dims must be at least 2 but got 0");
        refused(7, 1e4, "[RopeScaling] dims must be even but got 7");
        refused(8, 0.0, "[RopeScaling] base must be finite and above 0 but got 0");
        refused(8, f32::NAN, "[RopeScaling] base must be finite and above 0 but got NaN");
    }
    let message = "[RopeScaling] base must be finite and above 1 but got 1";
    assert_refused(&yarn(YarnRamp::WholePairs), (8, 1.0, 1), message);
}
