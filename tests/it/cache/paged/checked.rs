//! A pool with one layer beside lists of what its sequences should hold, and attention over those by loops.

use std::collections::BTreeMap;

use mlx_primitives::{
    Dispatch, Layout,
    attention::{BlockForm, FlashAttentionOptions, KvCache, Window},
    cache::{PagedKv, PagedKvOptions, PagedPool, PagedPoolOptions, PagedStep, SequenceId},
};
use mlx_rs::{Array, Dtype, ops::indexing::IndexOp, transforms::eval};

use crate::{
    attention::row::{self, Rule},
    support::{
        compare::{Tolerance, assert_close},
        e4m3,
        sample::Random,
        tensor::Tensor,
    },
};

pub(super) const F32: Dtype = Dtype::Float32;
pub(super) const BLOCK: i32 = 4;
pub(super) const BLOCKS: i32 = 64;
/// Query heads, key heads, key size, value size.
pub(super) const HEADS: [usize; 4] = [4, 2, 8, 5];

pub(super) fn pool() -> PagedPool {
    let options = PagedPoolOptions { block_size: BLOCK, ..PagedPoolOptions::new(BLOCKS) };
    PagedPool::new(options).unwrap()
}

pub(super) fn kv(dtype: Dtype, [keys, values]: [BlockForm; 2]) -> PagedKv {
    let [_, heads, size, value_size] = HEADS.map(|size| size as i32);
    PagedKv::new(&PagedKvOptions {
        blocks: BLOCKS,
        block_size: BLOCK,
        num_kv_heads: heads,
        head_dim: size,
        value_dim: Some(value_size),
        dtype,
        keys,
        values,
    })
    .unwrap()
}

/// The numbers of a token at a position: the same whichever sequence it is in.
pub(super) fn numbers(seed: u64, token: u32, position: usize, count: usize) -> Vec<f32> {
    let mut random = Random::new(seed << 40 | u64::from(token) << 20 | position as u64);
    (0..count).map(|_| random.normal() as f32).collect()
}

/// `[T, 1, heads, size]` in `layout`, rows beyond the tokens filled with NaN.
pub(super) fn rows(
    seed: u64,
    tokens: &[(u32, usize)],
    count: i32,
    [heads, size]: [usize; 2],
    layout: Layout,
    dtype: Dtype,
) -> Array {
    let mut values: Vec<f32> = tokens
        .iter()
        .flat_map(|&(token, position)| numbers(seed, token, position, heads * size))
        .collect();
    values.resize(count as usize * heads * size, f32::NAN);
    let shape = match layout {
        Layout::Bshd => [count, 1, heads as i32, size as i32],
        Layout::Bhsd => [count, heads as i32, 1, size as i32],
    };
    Array::from_slice(&values, &shape).as_dtype(dtype).unwrap()
}

/// What attention is asked for beside the tokens.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) name: &'static str,
    pub(super) causal: bool,
    pub(super) window: Option<i32>,
    pub(super) soft_cap: Option<f32>,
    pub(super) alibi: bool,
    pub(super) sinks: bool,
    pub(super) scale: Option<f32>,
}

pub(super) const PLAIN: Asked = Asked {
    name: "plain",
    causal: true,
    window: None,
    soft_cap: None,
    alibi: false,
    sinks: false,
    scale: None,
};

pub(super) const ASKED: [Asked; 6] = [
    PLAIN,
    Asked { name: "not causal", causal: false, ..PLAIN },
    Asked { name: "window", window: Some(5), ..PLAIN },
    Asked { name: "ALiBi", alibi: true, ..PLAIN },
    Asked { name: "soft cap and scale", soft_cap: Some(1.5), scale: Some(0.7), ..PLAIN },
    Asked { name: "sinks", sinks: true, ..PLAIN },
];

impl Asked {
    pub(super) fn rule(self, head: usize) -> Rule {
        Rule {
            scale: self.scale.map_or(1.0 / (HEADS[2] as f64).sqrt(), f64::from),
            cap: self.soft_cap.map(f64::from),
            slope: if self.alibi { f64::from(SLOPES[head]) } else { 0.0 },
            window: [self.window.map(i64::from), self.causal.then_some(0)],
            sink: self.sinks.then(|| f64::from(SLOPES[head])),
        }
    }
}

pub(super) const SLOPES: [f32; 4] = [0.5, 0.25, 0.125, 1.0];

/// A pool with a layer, and what its sequences should hold.
pub(super) struct Checked {
    pub(super) pool: PagedPool,
    pub(super) kv: PagedKv,
    pub(super) lists: BTreeMap<SequenceId, Vec<u32>>,
    pub(super) written: BTreeMap<SequenceId, usize>,
    pub(super) dtype: Dtype,
    pub(super) forms: [BlockForm; 2],
    pub(super) dispatch: Dispatch,
}

impl Checked {
    pub(super) fn new(dtype: Dtype) -> Self {
        Self::in_forms(dtype, [BlockForm::Plain; 2])
    }

    pub(super) fn in_forms(dtype: Dtype, forms: [BlockForm; 2]) -> Self {
        let (lists, written) = (BTreeMap::new(), BTreeMap::new());
        let (pool, kv) = (pool(), kv(dtype, forms));
        Self { pool, kv, lists, written, dtype, forms, dispatch: Dispatch::Auto }
    }

    pub(super) fn open(&mut self, prompt: &[u32]) -> SequenceId {
        let id = self.pool.open(prompt, b"").unwrap();
        let held = self.pool.len(id).unwrap() as usize;
        self.lists.insert(id, prompt[..held].to_vec());
        self.written.insert(id, held);
        id
    }

    pub(super) fn append(&mut self, id: SequenceId, tokens: &[u32]) {
        self.pool.append(id, tokens).unwrap();
        self.lists.get_mut(&id).unwrap().extend(tokens);
    }

    pub(super) fn fork(&mut self, id: SequenceId) -> SequenceId {
        let twin = self.pool.fork(id).unwrap();
        self.lists.insert(twin, self.lists[&id].clone());
        self.written.insert(twin, self.written[&id]);
        twin
    }

    pub(super) fn close(&mut self, id: SequenceId) {
        self.pool.close(id).unwrap();
        self.lists.remove(&id);
        self.written.remove(&id);
    }

    pub(super) fn attended(
        &mut self,
        step: &PagedStep,
        tokens: &[(u32, usize)],
        asked: Asked,
        layout: Layout,
    ) -> Array {
        let [heads, key_heads, size, value_size] = HEADS;
        let of = |seed, shape| rows(seed, tokens, step.rows(), shape, layout, self.dtype);
        let [queries, keys, values] =
            [of(1, [heads, size]), of(2, [key_heads, size]), of(3, [key_heads, value_size])];
        let slopes = Array::from_slice(&SLOPES, &[4]);
        let options = FlashAttentionOptions {
            causal: asked.causal,
            window: Window { left: asked.window, right: None },
            soft_cap: asked.soft_cap,
            scale: asked.scale,
            alibi_slopes: asked.alibi.then_some(&slopes),
            sinks: asked.sinks.then_some(&slopes),
            layout,
            dispatch: self.dispatch,
            ..Default::default()
        };
        self.kv.layer(step).attend(&queries, &keys, &values, options).unwrap()
    }

    /// `[T, H, D_v]` for the rows of tokens, each over those that its sequence has.
    fn expected(&self, ran: &[(SequenceId, usize)], asked: Asked) -> Vec<f64> {
        let [heads, key_heads, size, value_size] = HEADS;
        let mut result = Vec::new();
        for &(id, first) in ran {
            let (keys, values) = (self.held(0, id), self.held(1, id));
            for (position, &token) in self.lists[&id].iter().enumerate().skip(first) {
                let query = self.rounded(1, token, position, heads * size);
                for head in 0..heads {
                    let group = head / (heads / key_heads);
                    let part = |all: &'_ [Vec<f64>], size: usize| -> Vec<Vec<f64>> {
                        all.iter()
                            .map(|row| row[group * size..(group + 1) * size].to_vec())
                            .collect()
                    };
                    let (keys, values) = (part(&keys, size), part(&values, value_size));
                    let keys: Vec<_> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<_> = values.iter().map(Vec::as_slice).collect();
                    let query = &query[head * size..(head + 1) * size];
                    let rule = asked.rule(head);
                    result.extend(
                        row::attend(query, &keys, &values, position as i64, value_size, rule).0,
                    );
                }
            }
        }
        result
    }

    fn rounded(&self, seed: u64, token: u32, position: usize, count: usize) -> Vec<f64> {
        let numbers = numbers(seed, token, position, count);
        let numbers = Array::from_slice(&numbers, &[count as i32]);
        Tensor::of(&numbers.as_dtype(self.dtype).unwrap()).values
    }

    /// The keys of a sequence, or its values: those that were written, or in 8 bits what the blocks hold of them, which must
    /// be close.
    pub(super) fn held(&self, side: usize, id: SequenceId) -> Vec<Vec<f64>> {
        let (form, size, heads) = (self.forms[side], HEADS[2 + side], HEADS[1]);
        let tokens = self.lists[&id].iter().enumerate();
        let written = tokens
            .map(|(position, &token)| self.rounded(2 + side as u64, token, position, heads * size));
        if form == BlockForm::Plain {
            return written.collect();
        }
        let [blocks, scales] = match side {
            0 => [self.kv.key_blocks(), self.kv.key_scales().map(Option::unwrap)],
            _ => [self.kv.value_blocks(), self.kv.value_scales().map(Option::unwrap)],
        }
        .map(|array| Tensor::of(&array.unwrap()));
        let table = self.pool.table(id).unwrap();
        let mut held = Vec::new();
        for (position, written) in written.enumerate() {
            let block = table[position / BLOCK as usize] as usize;
            let slot = position % BLOCK as usize;
            let number = |index: usize| {
                let (head, d) = (index / size, index % size);
                let stored = blocks.at(&[block, slot, head, d]);
                stands_for(form, stored) * scales.at(&[block, slot, head])
            };
            let row: Vec<_> = (0..heads * size).map(number).collect();
            for (row, written) in row.chunks(size).zip(written.chunks(size)) {
                assert_as_close_as_said(form, row, written);
            }
            held.push(row);
        }
        held
    }

    /// Reads a sequence: what was written, unless some of it waits for a step.
    pub(super) fn read(&self, id: SequenceId) {
        let read = self.kv.read(&self.pool, id);
        if self.written[&id] < self.lists[&id].len() {
            let refused = read.unwrap_err().to_string();
            assert!(refused.contains("no appended tokens that are in no step yet"), "{refused}");
            return;
        }
        let (keys, values) = read.unwrap();
        let sides = [keys, values].into_iter().enumerate();
        for (side, array) in sides.filter(|&(side, _)| self.forms[side] == BlockForm::Plain) {
            let held = self.held(side, id);
            let shape = [1, held.len(), HEADS[1], HEADS[2 + side]];
            assert_eq!(Tensor::of(&array), Tensor::new(&shape, held.concat()), "{id:?}");
        }
    }

    /// Runs a step over these sequences, and compares every row with the oracle.
    pub(super) fn step(&mut self, ids: &[SequenceId], rows: usize, asked: Asked, layout: Layout) {
        let ran: Vec<_> = ids.iter().map(|id| (*id, self.written[id])).collect();
        let tokens: Vec<_> = ran
            .iter()
            .flat_map(|(id, first)| {
                let list = &self.lists[id];
                (*first..list.len()).map(|position| (list[position], position))
            })
            .collect();
        let step = self.pool.step(ids, rows).unwrap();
        if rows.is_multiple_of(2) {
            eval(&self.kv.gather(&step).unwrap()).unwrap();
        }
        let attended = self.attended(&step, &tokens, asked, layout);
        let real = attended.index(..tokens.len() as i32);
        let shape = [tokens.len(), HEADS[0], HEADS[3]];
        let expected = Tensor::new(&shape, self.expected(&ran, asked));
        let real = real.reshape(&shape.map(|size| size as i32)).unwrap();
        let tolerance = Tolerance::of("flash_attention", self.dtype);
        assert_close(asked.name, &real, &expected, tolerance);
        let padding = attended.index(tokens.len() as i32..);
        assert!(Tensor::of(&padding).values.iter().all(|&value| value == 0.0));
        for &id in ids {
            self.written.insert(id, self.lists[&id].len());
        }
        self.pool.computed(&step).unwrap();
    }
}

/// The number that a stored one is, before its scale.
fn stands_for(form: BlockForm, stored: f64) -> f64 {
    if form == BlockForm::Int8 { stored } else { e4m3(stored as u8) }
}

/// Whether the numbers of a head are as close to those that were written as `BlockForm` says.
pub(super) fn assert_as_close_as_said(form: BlockForm, head: &[f64], written: &[f64]) {
    let most = written.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    for (&held, &written) in head.iter().zip(written) {
        let said = match form {
            BlockForm::Plain => 0.0,
            BlockForm::Int8 => most / 254.0,
            _ => written.abs() / 16.0 + most * 2_f64.powi(-18),
        };
        // Scales are f32, and so is what a number is divided by them.
        let allowed = said + most * f64::from(f32::EPSILON) * 2.0;
        assert!((held - written).abs() <= allowed, "{form:?}: {held} for {written} below {most}");
    }
}
