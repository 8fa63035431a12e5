//! Linear attention as it is defined: each weight by itself, in f64.

use crate::support::tensor::Tensor;

/// The keys a query sees, and what is added to the sum of their weights.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) causal: bool,
    pub(crate) eps: f64,
}

/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`, where
/// `weight(query, key, i, j)` is that of one pair, with the last query at the position of the last key.
pub(crate) fn average(
    [queries, keys, values]: [&Tensor; 3],
    rule: Rule,
    weight: impl Fn(&[f64], &[f64], i64, i64) -> f64,
) -> Tensor {
    let &[batch, rows, heads, _] = &queries.shape[..] else { panic!("rank") };
    let &[_, columns, kv_heads, size] = &values.shape[..] else { panic!("rank") };
    let mut result = Vec::new();
    for b in 0..batch {
        for i in 0..rows {
            let position = i as i64 + columns as i64 - rows as i64;
            for h in 0..heads {
                let group = h / (heads / kv_heads);
                let query = vector(queries, [b, i, h]);
                let mut sums = vec![0.0; size];
                let mut normalizer = rule.eps;
                for j in (0..columns).filter(|&j| !rule.causal || j as i64 <= position) {
                    let key = vector(keys, [b, j, group]);
                    let weight = weight(query, key, position, j as i64);
                    normalizer += weight;
                    let value = vector(values, [b, j, group]);
                    sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * v);
                }
                let weighs = normalizer > 0.0;
                result.extend(sums.iter().map(|sum| if weighs { sum / normalizer } else { 0.0 }));
            }
        }
    }
    Tensor::new(&[batch, rows, heads, size], result)
}

fn vector(tensor: &Tensor, [b, s, h]: [usize; 3]) -> &[f64] {
    let &[_, length, heads, size] = &tensor.shape[..] else { panic!("rank") };
    let start = ((b * length + s) * heads + h) * size;
    &tensor.values[start..start + size]
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
