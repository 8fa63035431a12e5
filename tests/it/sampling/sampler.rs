use mlx_primitives::{
    Error,
    sampling::{Sampler, SamplingOptions},
};
use mlx_rs::{Array, Dtype, ops::concatenate, random};

use super::{chi_squared, critical};
use crate::support::sample::normal;

fn text(sampler: &mut Sampler, logits: &Array, length: usize) -> Vec<u32> {
    let tokens: Vec<_> = (0..length).map(|_| sampler.sample(logits).unwrap()).collect();
    concatenate(&tokens, 0).unwrap().to_vec_cast::<u32>().unwrap()
}

fn sampler(seed: u64) -> Sampler {
    Sampler::new(SamplingOptions::default(), seed).unwrap()
}

#[test]
fn a_seed_reproduces_a_text_whatever_else_was_drawn() {
    let logits = normal(1, &[1, 100], Dtype::Float32);
    let expected = text(&mut sampler(7), &logits, 50);
    let mut again = sampler(7);
    let mut drawn = Vec::new();
    for _ in 0..5 {
        random::seed(99).unwrap();
        random::uniform::<_, f32>(0.0, 1.0, &[3], None).unwrap();
        text(&mut sampler(8), &logits, 3);
        drawn.extend(text(&mut again, &logits, 10));
    }
    assert_eq!(drawn, expected);
    assert_ne!(text(&mut sampler(8), &logits, 50), expected);
}

#[test]
fn a_draw_depends_on_its_number_and_not_on_earlier_logits() {
    let (logits, other) =
        (normal(1, &[1, 100], Dtype::Float32), normal(2, &[4, 9], Dtype::Float16));
    let (mut a, mut b) = (sampler(7), sampler(7));
    text(&mut a, &logits, 5);
    text(&mut b, &other, 5);
    assert_eq!((a.draws(), b.draws()), (5, 5));
    assert_eq!(text(&mut a, &logits, 20), text(&mut b, &logits, 20));
}

#[test]
fn draws_follow_the_distribution_and_one_another_freely() {
    let drawn = text(&mut sampler(1), &Array::zeros::<f32>(&[1, 4]).unwrap(), 4000);
    assert!(chi_squared(&drawn, &[0.25; 4]) < critical(3));
    let pairs: Vec<_> = drawn.chunks(2).map(|pair| 4 * pair[0] + pair[1]).collect();
    assert!(chi_squared(&pairs, &[1.0 / 16.0; 16]) < critical(15));
}

#[test]
fn a_failed_draw_is_no_draw() {
    let logits = normal(1, &[1, 100], Dtype::Float32);
    let mut failing = sampler(7);
    assert!(failing.sample(Array::zeros::<f32>(&[1, 0]).unwrap()).is_err());
    assert_eq!(failing.draws(), 0);
    assert_eq!(text(&mut failing, &logits, 20), text(&mut sampler(7), &logits, 20));
}

#[test]
fn options_are_refused_before_the_first_draw() {
    let options = SamplingOptions { temperature: f32::NAN, ..Default::default() };
    let refused = Sampler::new(options, 0);
    assert!(matches!(refused, Err(Error::Value { argument: "temperature", .. })));
    assert_eq!(sampler(0).options(), &SamplingOptions::default());
}
