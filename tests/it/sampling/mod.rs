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
