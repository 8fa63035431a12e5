//! Attention as it is defined: for each query, one loop over the keys.

use std::ops::Range;

use crate::support::tensor::Tensor;

/// Which keys a query may see, and what is added to their scores.
#[derive(Clone, Copy, Default)]
pub(crate) enum Mask<'a> {
    #[default]
    None,
    /// Nonzero where the key may be seen.
    Boolean(&'a Tensor),
    Additive(&'a Tensor),
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Rule<'a> {
    pub(crate) scale: f64,
    pub(crate) soft_cap: Option<f64>,
    /// `[H]` or `[B, H]`.
    pub(crate) slopes: Option<&'a Tensor>,
    pub(crate) mask: Mask<'a>,
    pub(crate) causal: bool,
    pub(crate) left: Option<i32>,
    pub(crate) right: Option<i32>,
    /// Where sequences begin and end among queries and among keys.
    pub(crate) segments: Option<[&'a [i32]; 2]>,
    /// `[H]`.
    pub(crate) sinks: Option<&'a Tensor>,
    /// What each weight is multiplied by, `[B, H, S_q, S_kv]`.
    pub(crate) kept: Option<&'a Tensor>,
}

/// `[B, S_q, H, D]`, `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]` to `[B, S_q, H, D_v]`, and the log-sum-exp as
/// `[B, H, S_q]`.
pub(crate) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    rule: Rule,
) -> (Tensor, Tensor) {
    let &[batch, query_length, heads, _] = &queries.shape[..] else { panic!("rank") };
    let &[_, key_length, kv_heads, _] = &keys.shape[..] else { panic!("rank") };
    let size = *values.shape.last().unwrap();
    let mut result = Vec::new();
    let mut sums = vec![0.0; batch * heads * query_length];
    for (b, i, h) in triples(batch, query_length, heads) {
        let kv_head = h / (heads / kv_heads);
        let sequence = Sequence::of(i, query_length, key_length, rule.segments);
        let scores: Vec<_> = (0..key_length)
            .map(|j| {
                let product = dot(vector(queries, b, i, h), vector(keys, b, j, kv_head));
                rule.score(product, &sequence, [b, h, i, j])
            })
            .collect();
        let sink = rule.sinks.map(|sinks| sinks.values[h]);
        let (weights, sum) = softmax(&scores, sink);
        sums[(b * heads + h) * query_length + i] = sum;
        let mut average = vec![0.0; size];
        for (j, weight) in weights.into_iter().enumerate() {
            let kept = rule.kept.map_or(1.0, |kept| kept.at(&[b, h, i, j]));
            for (sum, value) in average.iter_mut().zip(vector(values, b, j, kv_head)) {
                *sum += kept * weight * value;
            }
        }
        result.extend(average);
    }
    let output = Tensor::new(&[batch, query_length, heads, size], result);
    (output, Tensor::new(&[batch, heads, query_length], sums))
}

/// The sequence that a query belongs to.
struct Sequence {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Sequence {
    fn of(i: usize, queries: usize, keys: usize, segments: Option<[&[i32]; 2]>) -> Self {
        let Some([of_queries, of_keys]) = segments else {
            return Self { queries: 0..queries, keys: 0..keys };
        };
        let range = |bounds: &[i32], n: usize| bounds[n] as usize..bounds[n + 1] as usize;
        let own = (0..of_queries.len() - 1).find(|&n| range(of_queries, n).contains(&i));
        own.map_or(Self { queries: 0..0, keys: 0..0 }, |n| Self {
            queries: range(of_queries, n),
            keys: range(of_keys, n),
        })
    }

    /// How far key `j` lies after the one beside query `i`, both counted from the end of the sequence.
    fn distance(&self, i: usize, j: usize) -> i64 {
        (self.queries.end - i) as i64 - (self.keys.end - j) as i64
    }
}

impl Rule<'_> {
    /// The score of a key, unless it is hidden.
    fn score(&self, product: f64, sequence: &Sequence, index: [usize; 4]) -> Option<f64> {
        let [b, h, i, j] = index;
        if !sequence.keys.contains(&j) {
            return None;
        }
        let distance = sequence.distance(i, j);
        let beyond = |side: Option<i32>, by: i64| side.is_some_and(|side| by > side.into());
        if self.causal && distance > 0
            || beyond(self.right, distance)
            || beyond(self.left, -distance)
        {
            return None;
        }
        let mut score = self.scale * product;
        if let Some(cap) = self.soft_cap {
            score = cap * (score / cap).tanh();
        }
        if let Some(slopes) = self.slopes {
            let slope = if slopes.shape.len() == 2 { slopes.at(&[b, h]) } else { slopes.at(&[h]) };
            score -= slope * distance.abs() as f64;
        }
        masked(score, self.mask, index)
    }
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

/// Weights that sum to one with the sink's, all zero where there is no score, and the logarithm of what they were
/// divided by.
fn softmax(scores: &[Option<f64>], sink: Option<f64>) -> (Vec<f64>, f64) {
    let largest = scores.iter().flatten().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return (vec![0.0; scores.len()], largest);
    }
    let power = |score: Option<f64>| score.map_or(0.0, |score| (score - largest).exp());
    let powers: Vec<_> = scores.iter().copied().map(power).collect();
    let sum = powers.iter().sum::<f64>() + power(sink);
    (powers.iter().map(|power| power / sum).collect(), largest + sum.ln())
}
