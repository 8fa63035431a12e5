use std::collections::BTreeSet;

use mlx_primitives::{
    Result,
    sampling::{SamplingOptions, sample},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{broadcast_to, concatenate, stack, zeros},
    random,
    transforms::compile::compile,
};

use super::{assert_follow, chi_squared, critical, softmax};
use crate::support::{FLOATING, sample::normal};

const DRAWS: i32 = 20_000;
const LOGITS: [f32; 8] = [0.3, -1.0, 1.2, 0.0, 0.7, -0.4, 0.1, -2.0];

fn tokens(array: &Array) -> Vec<u32> {
    assert_eq!(array.dtype(), Dtype::Uint32);
    if array.size() == 0 { Vec::new() } else { array.to_vec_cast::<u32>().unwrap() }
}

fn draw(logits: &[f32], count: i32, options: &SamplingOptions) -> Vec<u32> {
    let size = logits.len() as i32;
    let rows = broadcast_to(Array::from_slice(logits, &[1, size]), &[count, size]).unwrap();
    tokens(&sample(rows, random::key(11).unwrap(), options).unwrap())
}

/// `LOGITS` as probabilities at a temperature.
fn tempered(temperature: f64) -> Vec<f64> {
    softmax(&LOGITS.map(|v| f64::from(v) / temperature))
}

fn temperature(temperature: f32) -> SamplingOptions {
    SamplingOptions { temperature, ..Default::default() }
}

#[test]
fn draws_follow_the_distribution_and_no_other() {
    for t in [1.0, 0.5] {
        let drawn = draw(&LOGITS, DRAWS, &temperature(t));
        assert_follow(&format!("draws at {t}"), &drawn, &tempered(t.into()));
        let slightly_wrong = chi_squared(&drawn, &tempered(1.1 * f64::from(t)));
        assert!(slightly_wrong > critical(7), "temperature {t}: {slightly_wrong}");
    }
}

#[test]
fn filtered_draws_follow_what_is_left() {
    let options = SamplingOptions { top_k: 4, ..Default::default() };
    let drawn = draw(&LOGITS, 5000, &options);
    let mut left = LOGITS.map(f64::from);
    for worse in [1, 3, 5, 7] {
        left[worse] = f64::NEG_INFINITY;
    }
    assert_follow("draws of the best", &drawn, &softmax(&left));
}

#[test]
fn neighbouring_rows_are_independent() {
    let drawn = draw(&[0.0; 4], 16_000, &SamplingOptions::default());
    let pairs: Vec<_> = drawn.chunks(2).map(|pair| 4 * pair[0] + pair[1]).collect();
    assert_follow("neighbouring rows", &pairs, &[1.0 / 16.0; 16]);
}

#[test]
fn rows_share_no_noise_with_those_of_the_next_seeds() {
    const SIZE: i32 = 100_000;
    let flat = zeros::<f32>(&[4, SIZE]).unwrap();
    let of = |seed| tokens(&sample(&flat, random::key(seed).unwrap(), &temperature(1.0)).unwrap());
    let drawn: BTreeSet<_> = (0..8).flat_map(of).collect();
    assert_eq!(drawn.len(), 32);
}

#[test]
fn a_row_depends_on_its_key_and_nothing_else_in_the_batch() {
    let key = random::key(3).unwrap();
    let options = temperature(1.5);
    let logits = normal(1, &[6, 50], Dtype::Float32);
    let others = normal(2, &[6, 50], Dtype::Float32);
    let of = |logits: &Array| tokens(&sample(logits, &key, &options).unwrap());
    let whole = of(&logits);
    let first = logits.take_axis(Array::from_int(0), 0).unwrap();
    assert_eq!(of(&first), whole[..1], "alone");
    assert_eq!(of(&logits.reshape(&[2, 3, 50]).unwrap()), whole, "in rank 3");
    assert_eq!(of(&concatenate(&[&logits, &others], 0).unwrap())[..6], whole, "with others");
    assert_ne!(of(&concatenate(&[&others, &logits], 0).unwrap())[6..], whole, "in other rows");
}

#[test]
fn each_row_may_have_a_key_of_its_own() {
    let keys: Vec<_> = (0..5).map(|seed| random::key(seed).unwrap()).collect();
    let logits = normal(1, &[5, 50], Dtype::Float32);
    let options = SamplingOptions::default();
    let together = tokens(&sample(&logits, stack(&keys, 0).unwrap(), &options).unwrap());
    let alone = keys.iter().enumerate().flat_map(|(row, key)| {
        let logits = logits.take_axis(Array::from_int(row as i32), 0).unwrap();
        tokens(&sample(logits, key, &options).unwrap())
    });
    assert_eq!(together, alone.collect::<Vec<_>>());
}

/// Which tokens ever come.
fn support(logits: &[f32], options: &SamplingOptions) -> Vec<u32> {
    let mut drawn = draw(logits, 1000, options);
    drawn.sort_unstable();
    drawn.dedup();
    drawn
}

#[test]
fn the_filters_apply_in_the_documented_order() {
    let logits = [0.4_f32, 0.3, 0.2, 0.1].map(f32::ln);
    let of = |temperature, top_k, top_p, min_p| {
        support(&logits, &SamplingOptions { temperature, top_k, top_p, min_p })
    };
    assert_eq!(of(1.0, 0, 1.0, 0.0), [0, 1, 2, 3]);
    // The three best have 0.9; hot, no more than 0.77.
    assert_eq!(of(1.0, 0, 0.89, 0.0), [0, 1, 2]);
    assert_eq!(of(20.0, 0, 0.89, 0.0), [0, 1, 2, 3]);
    // Of the two best, the first has 0.57.
    assert_eq!(of(1.0, 2, 0.5, 0.0), [0]);
    // Had min-p gone first, two would have reached 0.75.
    assert_eq!(of(1.0, 0, 0.75, 0.3), [0, 1, 2]);
    assert_eq!(of(1.0, 0, 1.0, 0.6), [0, 1]);
}

#[test]
fn greedy_takes_the_best_and_of_equals_the_first() {
    let none = f32::NEG_INFINITY;
    let rows = [
        ([1.0, 3.0, 3.0], 1),
        ([5.0, 3.0, 5.0], 0),
        ([f32::NAN, 1.0, 2.0], 2),
        ([none, none, -1.0], 2),
        ([none; 3], 0),
        ([f32::NAN; 3], 0),
        ([0.0, f32::INFINITY, 1.0], 1),
    ];
    for dtype in FLOATING {
        for (row, expected) in rows {
            let logits = Array::from_slice(&row, &[3]).as_dtype(dtype).unwrap();
            let token = sample(logits, random::key(0).unwrap(), &temperature(0.0)).unwrap();
            assert_eq!(tokens(&token), [expected], "{row:?} {dtype:?}");
        }
    }
}

#[test]
fn what_may_not_be_drawn_never_is() {
    let none = f32::NEG_INFINITY;
    let options = SamplingOptions::default();
    assert_eq!(support(&[none, 0.0, none, f32::NAN, 0.0], &options), [1, 4]);
    assert_eq!(support(&[0.0, f32::INFINITY, 1.0], &options), [1]);
    assert_eq!(support(&[none; 4], &options), [0]);
    assert_eq!(support(&[f32::NAN; 4], &options), [0]);
    assert_eq!(support(&[1.0, 2.0, 2.0], &SamplingOptions { top_k: 1, ..options }), [1]);
}

#[test]
fn a_tiny_temperature_is_all_but_greedy() {
    for t in [1e-6, f32::MIN_POSITIVE, 1e-45] {
        assert_eq!(support(&[80.0, 100.0, 90.0, 100.0], &temperature(t)), [1, 3], "{t}");
    }
}

#[test]
fn shapes_and_dtypes() {
    let key = random::key(0).unwrap();
    for dtype in FLOATING {
        for options in [temperature(0.0), temperature(1.0)] {
            for leading in [&[][..], &[1], &[3], &[2, 3], &[0], &[2, 0]] {
                let logits = normal(1, &[leading, &[9]].concat(), dtype);
                let drawn = sample(&logits, &key, &options).unwrap();
                assert_eq!((drawn.shape(), drawn.dtype()), (leading, Dtype::Uint32));
                assert!(tokens(&drawn).into_iter().all(|token| token < 9));
            }
        }
    }
}

#[test]
fn it_compiles() {
    let draw = |(logits, key): (&Array, &Array)| -> Result<Array, Exception> {
        let options = SamplingOptions { temperature: 0.8, top_k: 20, top_p: 0.9, min_p: 0.01 };
        Ok(sample(logits, key, &options)?)
    };
    let (logits, key) = (normal(1, &[3, 50], Dtype::Float32), random::key(5).unwrap());
    let compiled = compile(draw, None)((&logits, &key)).unwrap();
    assert_eq!(tokens(&compiled), tokens(&draw((&logits, &key)).unwrap()));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let (x, key) = (normal(1, &[3, 5], Dtype::Float32), random::key(0).unwrap());
    let call = |x: &Array, key: &Array, options: SamplingOptions| {
        sample(x, key, &options).unwrap_err().to_string()
    };
    let ok = SamplingOptions::default;
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let message = call(&x, &key, temperature(bad));
        assert!(message.contains("[sample] temperature must be finite and at least 0"), "{bad}");
    }
    for bad in [0.0, -0.1, 1.1, f32::NAN] {
        let message = call(&x, &key, SamplingOptions { top_p: bad, ..ok() });
        assert!(message.contains("[sample] top_p must be above 0 and at most 1"), "{bad}");
    }
    for bad in [-0.1, 1.1, f32::NAN] {
        let message = call(&x, &key, SamplingOptions { min_p: bad, ..ok() });
        assert!(message.contains("[sample] min_p must be from 0 to 1"), "{bad}");
    }
    let message = call(&x, &key, SamplingOptions { top_k: -1, ..ok() });
    assert_eq!(message, "[sample] top_k must be at least 0 but got -1");
    let empty = Array::zeros::<f32>(&[3, 0]).unwrap();
    assert!(call(&empty, &key, ok()).contains("logits must have shape [..., D]"));
    let ints = Array::zeros::<i32>(&[5]).unwrap();
    assert!(call(&ints, &key, ok()).contains("logits must have dtype"));
    assert!(call(&x, &Array::from_f32(0.0), ok()).contains("key must have dtype Uint32"));
    let of = |shape: &[i32]| Array::zeros::<u32>(shape).unwrap();
    assert!(call(&x, &of(&[3]), ok()).contains("key must have shape [2] but got [3]"));
    assert!(call(&x, &of(&[4, 2]), ok()).contains("key must have shape [3, 2] but got [4, 2]"));
    assert!(call(&x, &of(&[]), ok()).contains("key must have shape [3, 2] but got []"));
}
