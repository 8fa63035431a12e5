//! Attention of one query, as it is defined: the oracle of what reads keys from unusual places.

/// What a query sees, and what becomes of its scores.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) scale: f64,
    pub(crate) cap: Option<f64>,
    pub(crate) slope: f64,
    /// Keys before the one beside the query, and after it.
    pub(crate) window: [Option<i64>; 2],
    pub(crate) sink: Option<f64>,
}

/// The average of `values`, each as long as `size`, and the log-sum-exp of the scores.
pub(crate) fn attend(
    query: &[f64],
    keys: &[&[f64]],
    values: &[&[f64]],
    beside: i64,
    size: usize,
    rule: Rule,
) -> (Vec<f64>, f64) {
    let scores: Vec<_> =
        (0..).zip(keys).map(|(j, key)| score(query, key, j - beside, rule)).collect();
    let all = || scores.iter().flatten().copied().chain(rule.sink);
    let largest = all().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = all().map(|score| (score - largest).exp()).sum();
    let mut average = vec![0.0; size];
    for (score, value) in scores.iter().zip(values) {
        let Some(score) = score else { continue };
        for (total, value) in average.iter_mut().zip(*value) {
            *total += (score - largest).exp() / sum * value;
        }
    }
    (average, if sum == 0.0 { f64::NEG_INFINITY } else { largest + sum.ln() })
}

/// The score of a key so far after the one beside the query, if it is seen.
fn score(query: &[f64], key: &[f64], after: i64, rule: Rule) -> Option<f64> {
    let [left, right] = rule.window;
    if left.is_some_and(|left| after < -left) || right.is_some_and(|right| after > right) {
        return None;
    }
    let product: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
    let score = rule.scale * product;
    let capped = rule.cap.map_or(score, |cap| cap * (score / cap).tanh());
    Some(capped - rule.slope * after.abs() as f64)
}
