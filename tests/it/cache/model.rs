//! The trivial model of a cache: lists of what was appended, and attention as f64 loops over what a token sees.

use mlx_primitives::Layout;
use mlx_rs::{Array, Dtype};

use crate::{
    attention::row::{self, Rule},
    support::{sample::normal, tensor::Tensor},
};

/// Query heads, key heads, key size, value size.
pub(crate) const HEADS: [i32; 4] = [4, 2, 8, 5];

/// Queries, keys and values of new tokens, in `layout`.
pub(crate) fn tokens(seed: u64, batch: i32, count: i32, layout: Layout) -> [Array; 3] {
    let [heads, key_heads, size, value_size] = HEADS;
    [(1, heads, size), (2, key_heads, size), (3, key_heads, value_size)].map(
        |(which, heads, size)| {
            let shape = match layout {
                Layout::Bshd => [batch, count, heads, size],
                Layout::Bhsd => [batch, heads, count, size],
            };
            normal(seed << 2 | which, &shape, Dtype::Float32)
        },
    )
}

/// The numbers of one token, of all heads.
type Numbers = Vec<f64>;

/// One row of a cache: keys and values of every token, none of them ever let go.
#[derive(Clone, Default)]
pub(crate) struct List {
    pub(crate) keys: Vec<Numbers>,
    pub(crate) values: Vec<Numbers>,
}

/// The tokens of one row of an array in `layout`.
fn of_row(array: &Array, row: usize, layout: Layout) -> Vec<Numbers> {
    let tensor = Tensor::of(array);
    let [_, a, b, size] = tensor.shape[..] else { panic!("{:?}", tensor.shape) };
    let (count, heads) = if layout == Layout::Bshd { (a, b) } else { (b, a) };
    let at = |token, head, i| match layout {
        Layout::Bshd => tensor.at(&[row, token, head, i]),
        Layout::Bhsd => tensor.at(&[row, head, token, i]),
    };
    let token = |token| {
        (0..heads)
            .flat_map(move |head| (0..size).map(move |i| (head, i)))
            .map(move |(head, i)| at(token, head, i))
    };
    (0..count).map(|t| token(t).collect()).collect()
}

impl List {
    pub(crate) fn append(&mut self, row: usize, keys: &Array, values: &Array, layout: Layout) {
        self.keys.extend(of_row(keys, row, layout));
        self.values.extend(of_row(values, row, layout));
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.keys.truncate(len);
        self.values.truncate(len);
    }

    /// What the last queries yield, `[S, H, D_v]`, where `sees(query, key)` says who sees whom, by position.
    pub(crate) fn attended(
        &self,
        row: usize,
        queries: &Array,
        layout: Layout,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let [heads, key_heads, size, value_size] = HEADS.map(|size| size as usize);
        let rule = Rule {
            scale: 1.0 / (size as f64).sqrt(),
            cap: None,
            slope: 0.0,
            window: [None, None],
            sink: None,
        };
        let queries = of_row(queries, row, layout);
        let first = self.keys.len() - queries.len();
        let mut result = Vec::new();
        for (i, query) in queries.iter().enumerate() {
            let seen: Vec<_> =
                (0..self.keys.len()).filter(|&position| sees(first + i, position)).collect();
            for head in 0..heads {
                let group = head / (heads / key_heads);
                let part = |all: &'_ [Numbers], size: usize| -> Vec<Numbers> {
                    seen.iter()
                        .map(|&p| all[p][group * size..(group + 1) * size].to_vec())
                        .collect()
                };
                let (keys, values) = (part(&self.keys, size), part(&self.values, value_size));
                let keys: Vec<_> = keys.iter().map(Vec::as_slice).collect();
                let values: Vec<_> = values.iter().map(Vec::as_slice).collect();
                let query = &query[head * size..(head + 1) * size];
                result.extend(row::attend(query, &keys, &values, 0, value_size, rule).0);
            }
        }
        result
    }
}

/// `[B, S, H, D_v]` of what attention yields in `layout`.
pub(crate) fn in_order(attended: &Array, layout: Layout) -> Array {
    match layout {
        Layout::Bshd => attended.clone(),
        Layout::Bhsd => attended.swap_axes(1, 2).unwrap(),
    }
}

/// What rows yield, as a tensor.
pub(crate) fn rows(rows: Vec<Vec<f64>>, count: i32) -> Tensor {
    let [heads, _, _, value_size] = HEADS.map(|size| size as usize);
    let shape = [rows.len(), count as usize, heads, value_size];
    Tensor::new(&shape, rows.into_iter().flatten().collect())
}
