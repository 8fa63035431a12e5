mod batch;
mod draw;
mod filter;
mod log_probability;

/// `softmax(logits)` in f64; a NaN or −∞ has none of it.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<_> =
        logits.iter().map(|v| if v.is_nan() { 0.0 } else { (v - max).exp() }).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// Pearson's statistic of `tokens` against `probabilities`, each of which must be positive or have
/// no token.
fn chi_squared(tokens: &[u32], probabilities: &[f64]) -> f64 {
    let mut counts = vec![0.0; probabilities.len()];
    for &token in tokens {
        counts[token as usize] += 1.0;
    }
    let expected = probabilities.iter().map(|p| p * tokens.len() as f64);
    let term = |(count, expected): (f64, f64)| match expected {
        0.0 => {
            assert_eq!(count, 0.0, "a token of probability 0 was drawn");
            0.0
        }
        _ => (count - expected).powi(2) / expected,
    };
    counts.into_iter().zip(expected).map(term).sum()
}

/// Refuses `tokens` that right draws from `probabilities` are once in a thousand times, and reports how they were.
pub(crate) fn assert_follow(what: &str, tokens: &[u32], probabilities: &[f64]) {
    let statistic = chi_squared(tokens, probabilities);
    let freedom = probabilities.iter().filter(|p| **p > 0.0).count() - 1;
    let (bound, draws) = (critical(freedom), tokens.len());
    println!(
        "χ²: {what}: {statistic:.1} of {bound:.1}, {freedom} degrees of freedom, {draws} draws"
    );
    assert!(statistic < bound, "{what}: {statistic}, not below {bound}");
}

/// What Pearson's statistic exceeds once in a thousand, by degrees of freedom.
fn critical(freedom: usize) -> f64 {
    const VALUES: [f64; 15] = [
        10.83, 13.82, 16.27, 18.47, 20.51, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26, 32.91, 34.53,
        36.12, 37.70,
    ];
    match freedom {
        0 => f64::MIN_POSITIVE,
        1..=15 => VALUES[freedom - 1],
        // By Wilson and Hilferty.
        _ => {
            let freedom = freedom as f64;
            let spread = 2.0 / (9.0 * freedom);
            freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3)
        }
    }
}
