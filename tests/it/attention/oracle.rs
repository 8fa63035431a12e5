//! Attention as it is defined: for each query, one loop over the keys.

use crate::support::tensor::Tensor;

/// Which keys a query may see, and what is added to their scores.
#[derive(Clone, Copy)]
pub(crate) enum Mask<'a> {
    None,
    /// Nonzero where the key may be seen.
    Boolean(&'a Tensor),
    Additive(&'a Tensor),
}

#[derive(Clone, Copy)]
pub(crate) struct Rule<'a> {
    pub(crate) scale: f64,
    pub(crate) causal: bool,
    pub(crate) mask: Mask<'a>,
}

/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`.
pub(crate) fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor, rule: Rule) -> Tensor {
    let &[batch, query_length, heads, _] = &queries.shape[..] else { panic!("rank") };
    let &[_, key_length, kv_heads, _] = &keys.shape[..] else { panic!("rank") };
    let size = *values.shape.last().unwrap();
    let mut result = Vec::new();
    for (b, i, h) in triples(batch, query_length, heads) {
        let kv_head = h / (heads / kv_heads);
        let scores: Vec<_> = (0..key_length)
            .map(|j| {
                let product = dot(vector(queries, b, i, h), vector(keys, b, j, kv_head));
                let visible = !rule.causal || j + query_length <= i + key_length;
                visible.then(|| masked(rule.scale * product, rule.mask, [b, h, i, j])).flatten()
            })
            .collect();
        let mut average = vec![0.0; size];
        for (j, weight) in softmax(&scores).into_iter().enumerate() {
            for (sum, value) in average.iter_mut().zip(vector(values, b, j, kv_head)) {
                *sum += weight * value;
            }
        }
        result.extend(average);
    }
    Tensor::new(&[batch, query_length, heads, size], result)
}

fn triples(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |x| (0..b).flat_map(move |y| (0..c).map(move |z| (x, y, z))))
}

fn vector(tensor: &Tensor, b: usize, s: usize, h: usize) -> &[f64] {
    let &[_, length, heads, size] = &tensor.shape[..] else { panic!("rank") };
    let start = ((b * length + s) * heads + h) * size;
    &tensor.values[start..start + size]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The score after the mask, unless the mask hides the key.
fn masked(score: f64, mask: Mask, index: [usize; 4]) -> Option<f64> {
    match mask {
        Mask::None => Some(score),
        Mask::Boolean(mask) => (broadcast_at(mask, index) != 0.0).then_some(score),
        Mask::Additive(mask) => {
            let added = broadcast_at(mask, index);
            (added > -32768.0).then_some(score + added)
        }
    }
}

fn broadcast_at(tensor: &Tensor, index: [usize; 4]) -> f64 {
    let own = &index[4 - tensor.shape.len()..];
    let own: Vec<_> =
        own.iter().zip(&tensor.shape).map(|(&i, &size)| if size == 1 { 0 } else { i }).collect();
    tensor.at(&own)
}

/// Weights that sum to one, or all zero where there is no score.
fn softmax(scores: &[Option<f64>]) -> Vec<f64> {
    let largest = scores.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<_> =
        scores.iter().map(|score| score.map_or(0.0, |score| (score - largest).exp())).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| if sum == 0.0 { 0.0 } else { power / sum }).collect()
}
