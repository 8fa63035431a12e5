//! A decoder block as f64 loops over slices.

use std::collections::HashMap;

use mlx_primitives::norm::RmsNorm;
use mlx_rs::module::ModuleParameters;

use crate::support::tensor::Tensor;

/// The weights of a block, by their names in the module.
pub(crate) struct Weights(HashMap<String, Tensor>);

impl Weights {
    pub(crate) fn of(module: &impl ModuleParameters) -> Self {
        let parameters = module.parameters().flatten();
        Self(
            parameters
                .into_iter()
                .map(|(name, array)| (name.to_string(), Tensor::of(array)))
                .collect(),
        )
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("{name} among {:?}", self.0.keys()))
    }

    /// `x · Wᵀ + b` for every row, with the bias if there is one.
    fn project(&self, name: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let weight = self.get(&format!("{name}.weight"));
        let bias = self.0.get(&format!("{name}.bias"));
        let product = |row: &Vec<f64>| {
            let columns = weight.rows().enumerate();
            columns.map(|(o, w)| dot(row, w) + bias.map_or(0.0, |bias| bias.values[o])).collect()
        };
        rows.iter().map(product).collect()
    }

    fn norm(&self, name: &str, rows: &[Vec<f64>], eps: f64) -> Vec<Vec<f64>> {
        let weight = &self.get(&format!("{name}.weight")).values;
        let normed = |row: &Vec<f64>| {
            let scale = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
            row.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
        };
        rows.iter().map(normed).collect()
    }

    /// Each head of every row normalized, if there is a weight of this name.
    fn norm_heads(&self, name: &str, rows: Vec<Vec<f64>>, size: usize) -> Vec<Vec<f64>> {
        if !self.0.contains_key(&format!("{name}.weight")) {
            return rows;
        }
        let heads = |row: &Vec<f64>| row.chunks(size).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let eps = RmsNorm::DEFAULT_EPS.into();
        rows.iter().map(|row| self.norm(name, &heads(row), eps).concat()).collect()
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) size: usize,
    pub(crate) rope_base: f64,
    pub(crate) scale: f64,
    pub(crate) causal: bool,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(a: &[Vec<f64>], b: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let sum = |(x, y): (&Vec<f64>, &Vec<f64>)| x.iter().zip(y).map(|(x, y)| x + y).collect();
    a.iter().zip(b).map(sum).collect()
}

/// Rotates pairs `(i, i + size / 2)` of one head at one position.
fn rotate(head: &[f64], position: usize, base: f64) -> Vec<f64> {
    let half = head.len() / 2;
    let mut rotated = head.to_vec();
    for i in 0..half {
        let angle = position as f64 * base.powf(-(i as f64) / half as f64);
        rotated[i] = head[i] * angle.cos() - head[i + half] * angle.sin();
        rotated[i + half] = head[i] * angle.sin() + head[i + half] * angle.cos();
    }
    rotated
}

fn head(row: &[f64], index: usize, size: usize) -> &[f64] {
    &row[index * size..(index + 1) * size]
}

/// Attention of one sequence, `[S, dims]` in and out.
pub(crate) fn attention(
    weights: &Weights,
    prefix: &str,
    x: &[Vec<f64>],
    heads: Heads,
) -> Vec<Vec<f64>> {
    let Heads { queries, keys, size, rope_base, scale, causal } = heads;
    let q = weights.project(&format!("{prefix}query"), x);
    let q = weights.norm_heads(&format!("{prefix}query_norm"), q, size);
    let k = weights.project(&format!("{prefix}key"), x);
    let k = weights.norm_heads(&format!("{prefix}key_norm"), k, size);
    let v = weights.project(&format!("{prefix}value"), x);
    let mut attended = vec![Vec::new(); x.len()];
    for (i, row) in attended.iter_mut().enumerate() {
        let end = if causal { i + 1 } else { x.len() };
        for h in 0..queries {
            let kv = h * keys / queries;
            let query = rotate(head(&q[i], h, size), i, rope_base);
            let score = |j: usize| {
                let key = rotate(head(&k[j], kv, size), j, rope_base);
                (dot(&query, &key) * scale).exp()
            };
            let scores: Vec<_> = (0..end).map(score).collect();
            let total: f64 = scores.iter().sum();
            row.extend((0..size).map(|d| {
                let mixed = (0..end).map(|j| scores[j] * head(&v[j], kv, size)[d]).sum::<f64>();
                mixed / total
            }));
        }
    }
    weights.project(&format!("{prefix}output"), &attended)
}

pub(crate) fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// The gated feed-forward of one sequence.
pub(crate) fn feed_forward(
    weights: &Weights,
    prefix: &str,
    x: &[Vec<f64>],
    activation: fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let gate = weights.project(&format!("{prefix}gate"), x);
    let up = weights.project(&format!("{prefix}up"), x);
    let gated =
        |(g, u): (&Vec<f64>, &Vec<f64>)| g.iter().zip(u).map(|(g, u)| activation(*g) * u).collect();
    let hidden: Vec<_> = gate.iter().zip(&up).map(gated).collect();
    weights.project(&format!("{prefix}down"), &hidden)
}

/// A pre-norm block on one sequence.
pub(crate) fn decoder_block(
    weights: &Weights,
    x: &[Vec<f64>],
    heads: Heads,
    eps: f64,
) -> Vec<Vec<f64>> {
    let normed = weights.norm("attention_norm", x, eps);
    let h = add(x, &attention(weights, "attention.", &normed, heads));
    let normed = weights.norm("feed_forward_norm", &h, eps);
    add(&h, &feed_forward(weights, "feed_forward.", &normed, silu))
}
