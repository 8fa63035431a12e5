//! Random operations on every kind of cache that holds one sequence, against lists.

use mlx_primitives::{
    Layout,
    attention::FlashAttentionOptions,
    cache::{
        Cache, RotatingKvCache, RotatingKvCacheOptions, SimpleKvCache, SimpleKvCacheOptions,
        load_caches, save_caches,
    },
};
use mlx_rs::{Array, Dtype};

use super::model::{List, in_order, rows, tokens};
use crate::support::{
    compare::{Tolerance, assert_close},
    sample::Random,
};

const BATCH: i32 = 2;

/// A kind of cache, and who sees whom in it.
struct Kind {
    name: &'static str,
    new: fn() -> Box<dyn Cache>,
    window: usize,
    sinks: usize,
    undo: usize,
}

fn rotating(window: i32, sinks: i32, undo: i32) -> Box<dyn Cache> {
    let options = RotatingKvCacheOptions { sinks, undo, ..RotatingKvCacheOptions::new(window) };
    Box::new(RotatingKvCache::with_options(options).unwrap())
}

const ALL: usize = usize::MAX;

const KINDS: [Kind; 6] = [
    Kind {
        name: "simple",
        new: || {
            let options = SimpleKvCacheOptions { step: 5, ..Default::default() };
            Box::new(SimpleKvCache::with_options(options).unwrap())
        },
        window: ALL,
        sinks: 0,
        undo: ALL,
    },
    Kind { name: "sliding", new: || rotating(7, 0, 0), window: 7, sinks: 0, undo: 0 },
    Kind { name: "one token", new: || rotating(1, 0, 0), window: 1, sinks: 0, undo: 0 },
    Kind { name: "sinks", new: || rotating(6, 3, 0), window: 6, sinks: 3, undo: 0 },
    Kind { name: "undo", new: || rotating(6, 0, 4), window: 6, sinks: 0, undo: 4 },
    Kind { name: "sinks and undo", new: || rotating(5, 2, 3), window: 5, sinks: 2, undo: 3 },
];

struct Checked<'a> {
    kind: &'a Kind,
    cache: Box<dyn Cache>,
    lists: Vec<List>,
    /// The longest that it was since it was empty.
    longest: usize,
}

impl Checked<'_> {
    fn len(&self) -> usize {
        self.lists[0].keys.len()
    }

    fn append(&mut self, random: &mut Random) {
        let layout = [Layout::Bshd, Layout::Bhsd][random.below(2)];
        let count = if random.below(3) == 0 { random.below(12) } else { 1 } as i32;
        let [q, k, v] = tokens(random.bits() >> 8, BATCH, count, layout);
        let end = self.len() + count as usize;
        let shown: Vec<bool> = (0..end).map(|_| random.below(4) > 0).collect();
        let masks = [None, Some(true), Some(false)];
        let form = masks[random.below(3)];
        let mask = form.map(|boolean| mask(&shown, boolean));
        let left = [None, Some(2), Some(9)][random.below(3)];
        let window = mlx_primitives::attention::Window { left, right: None };
        let options = FlashAttentionOptions {
            causal: true,
            window,
            mask: mask.as_ref(),
            layout,
            ..Default::default()
        };
        let attended = self.cache.attend(&q, &k, &v, options).unwrap();
        let Kind { window, sinks, .. } = *self.kind;
        let sees = |query: usize, key: usize| {
            let near = query - key.min(query) < window || key < sinks;
            let asked = left.is_none_or(|left| key + left as usize >= query);
            key <= query && near && asked && (form.is_none() || shown[key])
        };
        let attend = |(row, list): (usize, &mut List)| {
            list.append(row, &k, &v, layout);
            list.attended(row, &q, layout, sees)
        };
        let expected = rows(self.lists.iter_mut().enumerate().map(attend).collect(), count);
        let tolerance = Tolerance::of("flash_attention", Dtype::Float32);
        assert_close(self.kind.name, &in_order(&attended, layout), &expected, tolerance);
        self.longest = self.longest.max(end);
    }

    fn trim(&mut self, random: &mut Random) {
        let (len, Kind { window, sinks, undo, .. }) = (self.len(), self.kind);
        let tokens = random.below(len + 2);
        let kept_all = *window == ALL || self.longest <= sinks + window + undo;
        let oldest = if kept_all { 0 } else { self.longest - window - undo };
        let possible = if kept_all { len } else { (len + 1).saturating_sub(oldest + window) };
        assert_eq!(self.cache.trimmable() as usize, possible, "{}", self.kind.name);
        assert_eq!(self.cache.can_trim(tokens as i32), tokens <= possible);
        let trimmed = self.cache.trim(tokens as i32);
        assert_eq!(trimmed.is_ok(), tokens <= possible, "{trimmed:?}");
        if tokens <= possible {
            self.lists.iter_mut().for_each(|list| list.truncate(len - tokens));
        }
    }

    fn check(&self) {
        assert_eq!(self.cache.len() as usize, self.len());
        let Kind { window, sinks, .. } = *self.kind;
        let positions = self.cache.positions();
        assert!(positions.windows(2).all(|pair| pair[0] < pair[1]));
        let seen = |position: usize| position < sinks || self.len() - position < window;
        for position in (0..self.len()).filter(|&position| seen(position)) {
            assert!(positions.contains(&(position as i32)), "{position} of {positions:?}");
        }
        if window != ALL && !self.cache.is_empty() {
            let slots = window + sinks + self.kind.undo;
            assert!(positions.len() <= slots);
            assert_eq!(self.cache.nbytes(), BATCH as usize * 2 * slots * (8 + 5) * 4);
        }
    }
}

/// `[S_kv]`.
fn mask(shown: &[bool], boolean: bool) -> Array {
    let shape = [shown.len() as i32];
    match boolean {
        true => Array::from_slice(shown, &shape),
        false => {
            let added = shown.iter().map(|&shown| if shown { 0.0 } else { f32::NEG_INFINITY });
            Array::from_slice(&added.collect::<Vec<f32>>(), &shape)
        }
    }
}

#[test]
fn random_operations_leave_every_kind_equal_to_lists() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("caches.safetensors");
    for (seed, kind) in KINDS.iter().enumerate() {
        println!("seed {seed}, {}", kind.name);
        let mut random = Random::new(seed as u64);
        let lists = vec![List::default(); BATCH as usize];
        let mut checked = Checked { kind, cache: (kind.new)(), lists, longest: 0 };
        for turn in 0..200 {
            match random.below(16) {
                0 if turn > 0 => {
                    checked.cache.clear();
                    checked.lists.iter_mut().for_each(|list| list.truncate(0));
                    checked.longest = 0;
                    assert_eq!(checked.cache.nbytes(), 0);
                }
                1 => {
                    // The fork goes another way first, which must not be seen here.
                    let mut fork = checked.cache.fork().unwrap();
                    let [q, k, v] = tokens(turn, BATCH, 2, Layout::Bshd);
                    fork.attend(&q, &k, &v, FlashAttentionOptions::default()).unwrap();
                }
                2 => {
                    save_caches(&path, &[&*checked.cache], "a model").unwrap();
                    checked.cache = load_caches(&path, "a model").unwrap().remove(0);
                }
                3..6 => checked.trim(&mut random),
                _ => checked.append(&mut random),
            }
            checked.check();
        }
    }
}
