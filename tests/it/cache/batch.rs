use mlx_primitives::{
    Layout,
    attention::{FlashAttentionOptions, KvCache},
    cache::{
        BatchKvCache, BatchKvCacheOptions, Cache, KvForm, SimpleKvCache, SimpleKvCacheOptions,
    },
    layers::{AttentionBuilder, AttentionInput},
    rope::{Rope, RopeOffset},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::Module,
    ops::{concatenate, indexing::IndexOp, zeros},
};

use super::model::{List, in_order, rows, tokens};
use crate::support::{
    compare::{Tolerance, assert_close},
    sample::{Random, normal},
    tensor::Tensor,
};

const F32: Dtype = Dtype::Float32;

/// A batch, and for each row a list of all columns and how many of them are padding.
struct Checked {
    cache: BatchKvCache,
    lists: Vec<(List, usize)>,
}

impl Checked {
    fn new(padding: &[i32]) -> Self {
        let cache = BatchKvCache::new(padding).unwrap();
        let lists = padding.iter().map(|&padding| (List::default(), padding as usize)).collect();
        Self { cache, lists }
    }

    fn append(&mut self, seed: u64, count: i32, layout: Layout) {
        let [q, k, v] = tokens(seed, self.lists.len() as i32, count, layout);
        let options = FlashAttentionOptions { causal: true, layout, ..Default::default() };
        let attended = self.cache.attend(&q, &k, &v, options).unwrap();
        let attend = |(row, (list, padding)): (usize, &mut (List, usize))| {
            list.append(row, &k, &v, layout);
            list.attended(row, &q, layout, |query, key| key <= query && key >= *padding)
        };
        let expected = rows(self.lists.iter_mut().enumerate().map(attend).collect(), count);
        let tolerance = Tolerance::of("flash_attention", F32);
        assert_close("batch", &in_order(&attended, layout), &expected, tolerance);
    }

    fn filter(&mut self, kept: &[i32]) {
        self.cache.filter(kept).unwrap();
        self.lists = kept.iter().map(|&row| self.lists[row as usize].clone()).collect();
        let len = self.lists[0].0.keys.len();
        let shared = self.lists.iter().map(|(_, padding)| *padding).min().unwrap().min(len);
        for (list, padding) in &mut self.lists {
            list.keys.drain(..shared);
            list.values.drain(..shared);
            *padding -= shared;
        }
    }

    fn extend(&mut self, other: Self) {
        self.cache.extend(&other.cache).unwrap();
        self.lists.extend(other.lists);
        let len = self.lists.iter().map(|(list, _)| list.keys.len()).max().unwrap();
        for (list, padding) in &mut self.lists {
            let before = len - list.keys.len();
            list.keys.splice(..0, vec![vec![0.0; 16]; before]);
            list.values.splice(..0, vec![vec![0.0; 10]; before]);
            *padding += before;
        }
    }

    fn check(&self) {
        let padding: Vec<_> = self.lists.iter().map(|(_, padding)| *padding as i32).collect();
        assert_eq!(self.cache.left_padding(), padding);
        assert_eq!(self.cache.len() as usize, self.lists[0].0.keys.len());
        let RopeOffset::PerRow(offsets) = self.cache.offset() else { panic!("one for all rows") };
        let expected: Vec<_> = padding.iter().map(|padding| self.cache.len() - padding).collect();
        assert_eq!(offsets.as_slice::<i32>(), expected);
    }
}

#[test]
fn random_operations_leave_it_equal_to_lists() {
    for seed in 0..4 {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut checked = Checked::new(&[0, 3, 1]);
        checked.append(seed, 5, Layout::Bshd);
        for _ in 0..60 {
            match random.below(8) {
                0 => {
                    let count = 1 + random.below(3);
                    let kept: Vec<_> =
                        (0..count).map(|_| random.below(checked.lists.len()) as i32).collect();
                    checked.filter(&kept);
                }
                1 if checked.lists.len() < 5 => {
                    let padding = [random.below(3) as i32, 0];
                    let mut other = Checked::new(&padding);
                    other.append(random.bits() >> 8, 1 + random.below(9) as i32, Layout::Bshd);
                    checked.extend(other);
                }
                2 => {
                    let most = checked.cache.trimmable() as usize;
                    let tokens = random.below(most + 1);
                    checked.cache.trim(tokens as i32).unwrap();
                    let len = checked.lists[0].0.keys.len() - tokens;
                    checked.lists.iter_mut().for_each(|(list, _)| list.truncate(len));
                }
                3 => {
                    let row = random.below(checked.lists.len());
                    let (list, padding) = &checked.lists[row];
                    let alone = checked.cache.extract(row as i32).unwrap();
                    let (keys, _) = alone.contents(Layout::Bshd).unwrap().unwrap();
                    let padding = (*padding).min(list.keys.len());
                    assert_eq!(Tensor::of(&keys).values, list.keys[padding..].concat());
                    assert_eq!(alone.len() as usize, list.keys.len() - padding);
                }
                _ => {
                    let layout = [Layout::Bshd, Layout::Bhsd][random.below(2)];
                    let count = if random.below(3) == 0 { random.below(6) } else { 1 };
                    checked.append(random.bits() >> 8, count as i32, layout);
                }
            }
            checked.check();
        }
    }
}

#[test]
fn padded_prompts_say_what_each_says_alone() {
    let rope = Rope::new(4).unwrap();
    let builder = AttentionBuilder::new(12, 4).num_kv_heads(2).head_dim(8).rope(rope);
    let mut attention = builder.build().unwrap();
    let texts = [normal(1, &[1, 7, 12], F32), normal(2, &[1, 5, 12], F32)];
    let padding = zeros::<f32>(&[1, 2, 12]).unwrap();
    let padded = concatenate(&[&padding, &texts[1]], 1).unwrap();
    let prompts = concatenate(&[&texts[0], &padded], 0).unwrap();
    let mut cache = BatchKvCache::new(&[0, 2]).unwrap();
    let input = AttentionInput { x: &prompts, mask: None, cache: Some(&mut cache) };
    let y = attention.forward(input).unwrap();
    let token = normal(3, &[2, 1, 12], F32);
    let next = attention.forward((&token, &mut cache)).unwrap();

    let mut alone = [SimpleKvCache::new(), SimpleKvCache::new()];
    for row in 0..2 {
        let whole = Tensor::of(&attention.forward((&texts[row], &mut alone[row])).unwrap());
        let real = y.index((row as i32..row as i32 + 1, 2 * row as i32.., ..));
        assert_close("prompt", &real, &whole, Tolerance::LAYER);
        let one = token.index((row as i32..row as i32 + 1, .., ..));
        let said = Tensor::of(&attention.forward((&one, &mut alone[row])).unwrap());
        let real = next.index((row as i32..row as i32 + 1, .., ..));
        assert_close("token", &real, &said, Tolerance::LAYER);
    }

    let mut merged = BatchKvCache::merge(&[&alone[0], &alone[1]]).unwrap();
    assert_eq!((merged.left_padding(), merged.len()), (&[0, 2][..], 8));
    let again = attention.forward((&token, &mut merged)).unwrap();
    let expected = Tensor::of(&attention.forward((&token, &mut cache)).unwrap());
    assert_close("merged", &again, &expected, Tolerance::LAYER);
}

#[test]
fn rounded_rows_are_those_of_caches_of_one_sequence() {
    for (keys, values) in
        [(KvForm::Int8, KvForm::Fp8), (KvForm::Int4, KvForm::Plain), (KvForm::Plain, KvForm::Int4)]
    {
        let options = BatchKvCacheOptions { keys, values };
        let mut cache = BatchKvCache::with_options(&[0, 2], options).unwrap();
        let mut alone = [(); 2].map(|()| {
            let options = SimpleKvCacheOptions { keys, values, ..Default::default() };
            SimpleKvCache::with_options(options).unwrap()
        });
        let causal = || FlashAttentionOptions { causal: true, ..Default::default() };
        for (seed, count) in [(1, 7), (2, 1), (3, 3)] {
            let x = normal(seed, &[2, count, 2, 32], F32);
            let attended = cache.attend(&x, &x, &x, causal()).unwrap();
            for (row, alone) in (0..).zip(&mut alone) {
                // The first stretch of the second row begins with padding.
                let padding = if seed == 1 { 2 * row } else { 0 };
                let real = |array: &Array| array.index((row..row + 1, padding.., .., ..));
                let own = real(&x);
                let expected = alone.attend(&own, &own, &own, causal()).unwrap();
                let tolerance = Tolerance::of("flash_attention", F32);
                assert_close("row", &real(&attended), &Tensor::of(&expected), tolerance);
            }
        }
        let contents = |cache: &SimpleKvCache| {
            let (keys, values) = cache.contents(Layout::Bshd).unwrap().unwrap();
            [keys, values].map(|array| Tensor::of(&array))
        };
        let merged = BatchKvCache::merge(&[&alone[0], &alone[1]]).unwrap();
        for (row, alone) in (0..).zip(&alone) {
            assert_eq!(contents(&cache.extract(row).unwrap()), contents(alone));
            assert_eq!(contents(&merged.extract(row).unwrap()), contents(alone));
        }
    }
}

#[test]
fn refusals_change_nothing() {
    let mut cache = BatchKvCache::new(&[0, 1]).unwrap();
    let empty = BatchKvCache::new(&[0]).unwrap();
    let refused = |result: mlx_primitives::Result<()>| result.unwrap_err().to_string();
    assert!(refused(cache.extend(&empty)).starts_with("[BatchKvCache] self must hold something"));
    let x = normal(1, &[2, 3, 2, 8], F32);
    let none = FlashAttentionOptions::default;
    cache.attend(&x, &x, &x, none()).unwrap();
    assert!(refused(cache.extend(&empty)).starts_with("[BatchKvCache] other must hold something"));
    let mut wide = BatchKvCache::new(&[0]).unwrap();
    let y = normal(1, &[1, 3, 2, 16], F32);
    wide.attend(&y, &y, &y, none()).unwrap();
    assert!(refused(cache.extend(&wide)).contains("other must have the same heads"));
    assert!(refused(cache.filter(&[])).contains("rows must be one or more"));
    assert!(refused(cache.filter(&[2])).contains("row must be one of 2 but got 2"));
    assert!(refused(cache.extract(-1).map(drop)).contains("row must be one of 2 but got -1"));
    assert!(refused(cache.trim(3)).contains("tokens must be between 0 and 2"));
    let one = normal(1, &[1, 1, 2, 8], F32);
    assert!(refused(cache.attend(&one, &one, &one, none()).map(drop)).contains("keys must"));
    let mask = Array::from_slice(&[true; 3], &[3]);
    let short = FlashAttentionOptions { mask: Some(&mask), ..none() };
    let next = normal(1, &[2, 1, 2, 8], F32);
    let refusal = refused(cache.attend(&next, &next, &next, short).map(drop));
    assert!(refusal.contains("mask must have shape broadcastable to [2, 2, 1, 4]"), "{refusal}");
    assert_eq!((cache.len(), cache.left_padding()), (3, &[0, 1][..]));
    let mut padded = BatchKvCache::new(&[i32::MAX]).unwrap();
    let first = normal(1, &[1, 1, 2, 8], F32);
    padded.attend(&first, &first, &first, none()).unwrap();
    assert!(
        refused(padded.extend(&cache)).contains("leave each row less than 2^31 columns of padding")
    );
    assert!(BatchKvCache::new(&[]).is_err() && BatchKvCache::new(&[-1]).is_err());
    assert!(BatchKvCache::merge(&[]).is_err());
    assert!(BatchKvCache::merge(&[&SimpleKvCache::new()]).is_err());
    let mut two = SimpleKvCache::new();
    two.update(&x, &x, Layout::Bshd).unwrap();
    assert!(BatchKvCache::merge(&[&two]).is_err());
}
