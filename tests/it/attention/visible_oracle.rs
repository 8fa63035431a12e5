//! Softmax attention to the keys that a rule shows, in f64.

use super::linear_oracle::dot;
use crate::support::tensor::Tensor;

/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`; zeros where nothing is
/// visible.
pub(crate) fn attend_visible(
    [queries, keys, values]: [&Tensor; 3],
    scale: Option<f64>,
    visible: impl Fn(usize, usize) -> bool,
) -> Tensor {
    let &[batch, rows, heads, size] = &queries.shape[..] else { panic!("rank") };
    let &[_, columns, kv_heads, value_size] = &values.shape[..] else { panic!("rank") };
    let scale = scale.unwrap_or(1.0 / (size as f64).sqrt());
    let vector = |tensor: &Tensor, b: usize, s: usize, h: usize| -> Vec<f64> {
        let last = tensor.shape[3];
        let start = ((b * tensor.shape[1] + s) * tensor.shape[2] + h) * last;
        tensor.values[start..start + last].to_vec()
    };
    let mut result = Vec::new();
    for (b, i, h) in triples(batch, rows, heads) {
        let group = h / (heads / kv_heads);
        let query = vector(queries, b, i, h);
        let seen: Vec<_> = (0..columns).filter(|&j| visible(i, j)).collect();
        let scores: Vec<_> =
            seen.iter().map(|&j| scale * dot(&query, &vector(keys, b, j, group))).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        let mut average = vec![0.0; value_size];
        for (&j, score) in seen.iter().zip(&scores) {
            let weight = (score - largest).exp() / total;
            let value = vector(values, b, j, group);
            average.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
        }
        result.extend(average);
    }
    Tensor::new(&[batch, rows, heads, value_size], result)
}

fn triples(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |x| (0..b).flat_map(move |y| (0..c).map(move |z| (x, y, z))))
}
