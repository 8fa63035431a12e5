//! Masks of one's own in `flash_attention`: what a query may see, and what is added to its scores.
//!
//! `cargo run --release --example custom_mask`
//!
//! Values are the positions of their keys, so that a result is the mean position of what a query saw.
#![allow(clippy::print_stdout, reason = "a command line program prints")]

use anyhow::{Result, ensure};
use mlx_primitives::attention::{FlashAttentionOptions, flash_attention};
use mlx_rs::{
    Array,
    ops::{arange, tri},
};

const TOKENS: i32 = 6;

fn main() -> Result<()> {
    let none = FlashAttentionOptions::default;
    let causal = || FlashAttentionOptions { causal: true, ..none() };

    let seen = means("causal", causal())?;
    ensure!(seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);

    // A mask needs no more axes than it differs along: here one, that of the keys.
    let padding = Array::from_slice(&[true, true, true, true, false, false], &[TOKENS]);
    let seen = means(
        "causal, without padding",
        FlashAttentionOptions { mask: Some(&padding), ..causal() },
    )?;
    ensure!(seen == [0.0, 0.5, 1.0, 1.5, 1.5, 1.5]);

    // Everything sees the first three tokens, as in a prefix language model.
    let position = arange::<i32, i32>(None, TOKENS, None)?;
    let prefix = position.lt(Array::from_int(3))?;
    let causal_mask = tri::<bool>(TOKENS, None, None)?;
    let mask = causal_mask.logical_or(&prefix)?;
    let seen = means("prefix", FlashAttentionOptions { mask: Some(&mask), ..none() })?;
    ensure!(seen == [1.0, 1.0, 1.0, 1.5, 2.0, 2.5]);

    // Two documents in one sequence see themselves alone.
    let document = Array::from_slice(&[0, 0, 1, 1, 1, 1], &[TOKENS]);
    let mask = document.expand_dims(1)?.eq(document.expand_dims(0)?)?;
    let seen =
        means("causal, by document", FlashAttentionOptions { mask: Some(&mask), ..causal() })?;
    ensure!(seen == [0.0, 0.5, 2.0, 2.5, 3.0, 3.5]);

    // A query that may see nothing yields zero, not NaN: the first, before whom there is no token.
    let mask = tri::<bool>(TOKENS, None, Some(-1))?;
    let seen = means("what is before", FlashAttentionOptions { mask: Some(&mask), ..none() })?;
    ensure!(seen == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]);

    // Floats are added to the scores: here e times less weight for each step away, so that near keys count most.
    let distance = position.expand_dims(1)?.subtract(&position)?.abs()?;
    let mask = distance.as_type::<f32>()?.negative()?;
    let seen = means("fading", FlashAttentionOptions { mask: Some(&mask), ..causal() })?;
    ensure!(seen.windows(2).all(|pair| pair[0] < pair[1]) && seen[5] > 4.0);
    Ok(())
}

/// The mean position of what each query saw, where all keys match alike.
fn means(name: &str, options: FlashAttentionOptions) -> Result<Vec<f32>> {
    let alike = Array::zeros::<f32>(&[1, TOKENS, 1, 8])?;
    let positions = arange::<f32, f32>(None, TOKENS as f32, None)?.reshape(&[1, TOKENS, 1, 1])?;
    let y = flash_attention(&alike, &alike, positions, options)?;
    y.eval()?;
    // Sums of thirds and fifths are off by a rounding.
    let means: Vec<_> = y.as_slice::<f32>().iter().map(|mean| (mean * 1e5).round() / 1e5).collect();
    println!("{name:>24}: {means:?}");
    Ok(means)
}
