//! The shapes, masks and options that attention is tested with.

use mlx_rs::{Array, Dtype};

use crate::support::{sample::Random, tensor::Tensor};

const INF: f32 = f32::INFINITY;

/// Sizes as batch, heads, kv_heads, query_length, key_length, size, value_size.
#[derive(Clone, Copy)]
pub(crate) struct Sizes(pub(crate) [i32; 7]);

impl Sizes {
    pub(crate) fn queries(self) -> [i32; 4] {
        let Self([b, h, _, s_q, _, d, _]) = self;
        [b, s_q, h, d]
    }

    pub(crate) fn keys(self) -> [i32; 4] {
        let Self([b, _, h_kv, _, s_kv, d, _]) = self;
        [b, s_kv, h_kv, d]
    }

    pub(crate) fn values(self) -> [i32; 4] {
        let Self([b, _, h_kv, _, s_kv, _, d_v]) = self;
        [b, s_kv, h_kv, d_v]
    }

    pub(crate) fn result(self) -> [i32; 4] {
        let Self([b, h, _, s_q, _, _, d_v]) = self;
        [b, s_q, h, d_v]
    }

    /// Batch, query and head of each row of the result, in order.
    pub(crate) fn rows(self) -> impl Iterator<Item = (usize, usize, usize)> {
        let [b, s_q, h, _] = self.result().map(|size| size as usize);
        (0..b * s_q * h).map(move |row| (row / (s_q * h), row / h % s_q, row % h))
    }

    pub(crate) fn kv_head(self, head: usize) -> usize {
        let Self([_, h, h_kv, ..]) = self;
        head / (h / h_kv) as usize
    }
}

/// A mask by its shape and by what it hides.
#[derive(Clone, Copy)]
pub(crate) struct MaskOf {
    shape: &'static [i32],
    /// What a hidden key gets; booleans if there is none.
    additive: Option<f32>,
    hides: fn(&[usize]) -> bool,
}

pub(crate) const fn boolean(shape: &'static [i32], hides: fn(&[usize]) -> bool) -> MaskOf {
    MaskOf { shape, additive: None, hides }
}

pub(crate) const fn additive(
    shape: &'static [i32],
    hidden: f32,
    hides: fn(&[usize]) -> bool,
) -> MaskOf {
    MaskOf { shape, additive: Some(hidden), hides }
}

impl MaskOf {
    pub(crate) fn is_boolean(self) -> bool {
        self.additive.is_none()
    }

    pub(crate) fn array(self) -> Array {
        let mut random = Random::new(9);
        let shape: Vec<_> = self.shape.iter().map(|&size| size as usize).collect();
        let mask = Tensor::from_fn(&shape, |index| match self.additive {
            None => f64::from(!(self.hides)(index)),
            Some(hidden) if (self.hides)(index) => hidden.into(),
            Some(_) => random.normal(),
        });
        mask.to_array(if self.additive.is_some() { Dtype::Float32 } else { Dtype::Bool })
    }
}

/// ALiBi slopes, above and below zero.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum SlopesOf {
    Heads,
    BatchAndHeads,
}

#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) sizes: Sizes,
    pub(crate) causal: bool,
    pub(crate) left: Option<i32>,
    pub(crate) right: Option<i32>,
    pub(crate) scale: Option<f32>,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) slopes: Option<SlopesOf>,
    pub(crate) mask: Option<MaskOf>,
    /// Where sequences begin and end among queries and among keys.
    pub(crate) segments: Option<[&'static [i32]; 2]>,
    /// What sinks lie about.
    pub(crate) sinks: Option<f64>,
    pub(crate) strided: bool,
}

pub(crate) const fn case(name: &'static str, sizes: [i32; 7]) -> Case {
    Case {
        name,
        sizes: Sizes(sizes),
        causal: false,
        left: None,
        right: None,
        scale: None,
        soft_cap: None,
        slopes: None,
        mask: None,
        segments: None,
        sinks: None,
        strided: false,
    }
}

const fn causal(name: &'static str, sizes: [i32; 7]) -> Case {
    Case { causal: true, ..case(name, sizes) }
}

const fn masked(name: &'static str, mask: MaskOf) -> Case {
    Case { mask: Some(mask), ..case(name, MASKED) }
}

const fn masked_causal(name: &'static str, sizes: [i32; 7], mask: MaskOf) -> Case {
    Case { mask: Some(mask), ..causal(name, sizes) }
}

const MASKED: [i32; 7] = [2, 4, 2, 5, 7, 32, 32];

fn nothing(_: &[usize]) -> bool {
    false
}

fn everything(_: &[usize]) -> bool {
    true
}

/// About a third, spread over all axes.
pub(crate) fn some(index: &[usize]) -> bool {
    index.iter().enumerate().map(|(axis, i)| (axis + 1) * i).sum::<usize>() % 3 == 1
}

pub(crate) fn third_row(index: &[usize]) -> bool {
    some(index) || index[index.len() - 2] == 2
}

fn first_keys(index: &[usize]) -> bool {
    index[index.len() - 1] < 4
}

pub(crate) const CASES: &[Case] = &[
    case("one of everything", [1, 1, 1, 1, 1, 1, 1]),
    case("no batch", [0, 2, 2, 3, 3, 8, 8]),
    case("no queries", [1, 2, 2, 0, 3, 8, 8]),
    case("no keys", [1, 2, 1, 3, 0, 8, 8]),
    case("no query heads", [1, 0, 2, 3, 3, 8, 8]),
    case("no heads", [1, 0, 0, 3, 3, 8, 8]),
    case("no value size", [1, 2, 2, 3, 3, 8, 0]),
    causal("causal, no keys", [1, 2, 2, 3, 0, 8, 8]),
    case("head size 32", [2, 2, 2, 8, 9, 32, 32]),
    case("head size 64", [1, 2, 2, 7, 8, 64, 64]),
    case("head size 80", [1, 2, 2, 9, 7, 80, 80]),
    case("head size 96", [1, 2, 2, 7, 9, 96, 96]),
    case("head size 128", [1, 2, 2, 8, 7, 128, 128]),
    case("head size 256", [1, 2, 2, 9, 8, 256, 256]),
    case("narrow values", [1, 2, 2, 7, 9, 64, 32]),
    case("wide values", [1, 2, 1, 9, 7, 32, 80]),
    case("decode", [2, 4, 4, 1, 65, 64, 64]),
    case("63 to 65", [1, 2, 2, 63, 65, 32, 32]),
    case("65 to 64", [1, 2, 2, 65, 64, 32, 32]),
    case("groups of 4", [2, 8, 2, 7, 9, 64, 64]),
    case("groups of 8", [1, 16, 2, 8, 7, 32, 32]),
    case("multi-query", [2, 8, 1, 9, 63, 32, 32]),
    case("multi-query decode", [1, 8, 1, 1, 65, 64, 64]),
    Case { scale: Some(0.5), ..case("scale", [1, 2, 2, 7, 8, 8, 8]) },
    Case { scale: Some(0.0), ..case("scale 0", [1, 2, 2, 7, 8, 8, 8]) },
    Case { scale: Some(-0.5), ..causal("negative scale", [1, 2, 2, 7, 8, 8, 8]) },
    Case { strided: true, ..case("strided", [2, 4, 2, 7, 9, 64, 64]) },
    Case { strided: true, ..causal("strided causal", [2, 4, 2, 9, 7, 32, 32]) },
    causal("causal square", [2, 4, 2, 64, 64, 32, 32]),
    causal("causal decode", [2, 4, 2, 1, 9, 64, 64]),
    causal("causal, cached keys", [1, 4, 1, 8, 65, 32, 32]),
    causal("causal, one key before", [1, 2, 2, 64, 65, 32, 32]),
    causal("causal, one hidden query", [1, 2, 2, 65, 64, 32, 32]),
    causal("causal, all but one query hidden", [1, 4, 2, 7, 1, 32, 80]),
    masked("boolean scalar", boolean(&[], nothing)),
    masked("boolean scalar that hides all", boolean(&[], everything)),
    masked("boolean by key", boolean(&[7], some)),
    masked("boolean for all keys", boolean(&[1], everything)),
    masked("boolean by query and key", boolean(&[5, 7], some)),
    masked("boolean by query", boolean(&[5, 1], some)),
    masked("boolean by head", boolean(&[4, 1, 7], some)),
    masked("boolean by batch", boolean(&[2, 1, 1, 7], some)),
    masked("boolean by everything", boolean(&[2, 4, 5, 7], some)),
    masked("boolean with a hidden row", boolean(&[1, 1, 5, 7], third_row)),
    masked("boolean with hidden rows by batch", boolean(&[2, 1, 5, 7], third_row)),
    masked("boolean that hides all", boolean(&[5, 7], everything)),
    masked("additive scalar", additive(&[], 0.0, nothing)),
    masked("additive scalar that hides all", additive(&[], -INF, everything)),
    masked("additive by key", additive(&[7], -INF, some)),
    masked("additive by query and key", additive(&[5, 7], -INF, some)),
    masked("additive by query", additive(&[5, 1], -INF, some)),
    masked("additive by head", additive(&[4, 1, 7], -INF, some)),
    masked("additive by batch", additive(&[2, 1, 1, 7], -1e9, some)),
    masked("additive by everything", additive(&[2, 4, 5, 7], -INF, some)),
    masked("additive with a hidden row", additive(&[1, 1, 5, 7], -INF, third_row)),
    masked("additive with a row of -1e38", additive(&[1, 4, 5, 7], -1e38, third_row)),
    masked("additive with a row of f16's least", additive(&[5, 7], -65504.0, third_row)),
    masked("additive with a row of f32's least", additive(&[5, 7], f32::MIN, third_row)),
    masked_causal("causal and boolean", MASKED, boolean(&[2, 1, 5, 7], some)),
    masked_causal("causal and additive", MASKED, additive(&[4, 5, 7], -INF, some)),
    masked_causal("hidden by both, boolean", MASKED, boolean(&[7], first_keys)),
    masked_causal("hidden by both, additive", MASKED, additive(&[2, 1, 1, 7], -INF, first_keys)),
    masked_causal("more queries and boolean", [1, 4, 2, 9, 7, 32, 32], boolean(&[9, 7], some)),
    masked_causal(
        "more queries and additive",
        [2, 4, 2, 9, 7, 32, 32],
        additive(&[2, 1, 9, 7], -INF, some),
    ),
    masked_causal("more queries, mask by key", [1, 4, 2, 9, 7, 32, 32], boolean(&[7], first_keys)),
    masked_causal("one key, mask by query", [1, 2, 2, 4, 1, 32, 32], boolean(&[4, 1], nothing)),
];

const fn windowed(
    name: &'static str,
    sizes: [i32; 7],
    left: Option<i32>,
    right: Option<i32>,
) -> Case {
    Case { left, right, ..case(name, sizes) }
}

const fn capped(name: &'static str, sizes: [i32; 7]) -> Case {
    Case { scale: Some(0.5), soft_cap: Some(1.5), ..case(name, sizes) }
}

const fn sloped(name: &'static str, sizes: [i32; 7], slopes: SlopesOf) -> Case {
    Case { slopes: Some(slopes), ..case(name, sizes) }
}

const fn sunk(name: &'static str, sizes: [i32; 7], about: f64) -> Case {
    Case { sinks: Some(about), ..case(name, sizes) }
}

/// In a batch of one with 9 queries and 11 keys.
const fn in_segments(name: &'static str, queries: &'static [i32], keys: &'static [i32]) -> Case {
    Case { segments: Some([queries, keys]), ..case(name, [1, 4, 2, 9, 11, 16, 24]) }
}

const SQUARE: [i32; 7] = [2, 4, 2, 9, 9, 32, 32];
const CACHED: [i32; 7] = [2, 4, 1, 7, 12, 32, 16];
const MORE_QUERIES: [i32; 7] = [2, 2, 1, 12, 7, 16, 32];
const DECODE: [i32; 7] = [2, 8, 1, 1, 65, 64, 64];
/// Sequences of 3, 0, 4 and 2 queries and of 2, 4, 0 and 5 keys.
const QUERIES: &[i32] = &[0, 3, 3, 7, 9];
const KEYS: &[i32] = &[0, 2, 6, 6, 11];

/// So many rows that teams of simdgroups take them, and so many keys that whole blocks are before the diagonal.
const LONG: [i32; 7] = [1, 2, 1, 130, 150, 16, 16];

pub(crate) const MANY_ROWS: &[Case] = &[
    case("many rows", [1, 1, 1, 257, 40, 32, 16]),
    causal("many rows, causal", LONG),
    Case { slopes: Some(SlopesOf::Heads), ..causal("many rows, ALiBi", LONG) },
    Case { slopes: Some(SlopesOf::Heads), ..case("many rows, ALiBi both ways", LONG) },
    Case { soft_cap: Some(1.5), sinks: Some(0.5), ..causal("many rows, soft cap", LONG) },
    Case { soft_cap: Some(1e4), ..causal("a cap far above the scores", [1, 2, 1, 40, 50, 16, 16]) },
    Case {
        soft_cap: Some(1e-42),
        slopes: Some(SlopesOf::Heads),
        mask: Some(additive(&[50], f32::NEG_INFINITY, some)),
        ..causal("a cap of next to nothing", [1, 2, 1, 40, 50, 16, 16])
    },
    causal("many rows that see nothing", [1, 2, 1, 300, 40, 64, 64]),
    causal("many rows of wide heads", [2, 2, 1, 200, 190, 128, 72]),
    causal("many rows of odd heads", [1, 2, 1, 130, 70, 36, 1]),
    causal("many rows of heads in part of a panel", [1, 2, 1, 150, 140, 100, 36]),
    Case { strided: true, ..causal("many strided rows", [1, 4, 2, 140, 150, 64, 64]) },
    Case { left: Some(64), ..causal("many rows, causal window", [1, 1, 1, 300, 290, 64, 64]) },
    windowed("many rows, window", [1, 1, 1, 260, 400, 16, 80], Some(9), Some(70)),
    Case {
        left: Some(40),
        soft_cap: Some(1.5),
        slopes: Some(SlopesOf::Heads),
        mask: Some(additive(&[130, 150], f32::NEG_INFINITY, third_row)),
        segments: Some([&[0, 50, 130], &[0, 90, 150]]),
        ..causal("many rows, everything", LONG)
    },
];

/// One option at a time.
pub(crate) const OPTIONS: &[Case] = &[
    windowed("window left", SQUARE, Some(2), None),
    windowed("window right", SQUARE, None, Some(1)),
    windowed("window both", SQUARE, Some(1), Some(3)),
    windowed("window of one key", SQUARE, Some(0), Some(0)),
    windowed("window of the keys before", SQUARE, None, Some(0)),
    windowed("window of the keys after", SQUARE, Some(0), None),
    windowed("window wider than the keys", SQUARE, Some(100), Some(i32::MAX)),
    windowed("window with cached keys", CACHED, Some(2), Some(1)),
    windowed("window with more queries", MORE_QUERIES, Some(2), Some(1)),
    windowed("window of one key with more queries", MORE_QUERIES, Some(0), Some(0)),
    windowed("window of a decode", DECODE, Some(8), None),
    Case { causal: true, ..windowed("causal window", CACHED, Some(3), None) },
    Case { causal: true, ..windowed("causal wins over right", SQUARE, Some(3), Some(2)) },
    Case { causal: true, ..windowed("causal window, more queries", MORE_QUERIES, Some(1), None) },
    capped("soft cap", SQUARE),
    capped("soft cap of a decode", DECODE),
    Case { causal: true, ..capped("soft cap, causal", MORE_QUERIES) },
    sloped("slopes", SQUARE, SlopesOf::Heads),
    sloped("slopes by batch", CACHED, SlopesOf::BatchAndHeads),
    sloped("slopes with more queries", MORE_QUERIES, SlopesOf::Heads),
    sloped("slopes of a decode", DECODE, SlopesOf::BatchAndHeads),
    Case { causal: true, ..sloped("slopes, causal", SQUARE, SlopesOf::Heads) },
    sunk("sinks", SQUARE, 0.0),
    sunk("sinks of groups", [2, 8, 2, 7, 12, 64, 64], 1.0),
    sunk("sinks that drown all", SQUARE, 1e4),
    sunk("sinks of 30", CACHED, 30.0),
    sunk("sinks of -30", CACHED, -30.0),
    sunk("sinks of -1e4", CACHED, -1e4),
    sunk("sinks of a decode", DECODE, 3.0),
    sunk("sinks without keys", [1, 2, 1, 3, 0, 8, 8], 0.0),
    Case { causal: true, ..sunk("sinks, causal", MORE_QUERIES, 0.0) },
    in_segments("one segment", &[0, 9], &[0, 11]),
    in_segments("segments", &[0, 4, 9], &[0, 5, 11]),
    in_segments("empty segments", QUERIES, KEYS),
    in_segments("no segment", &[0], &[0]),
    Case { causal: true, ..in_segments("causal segments", &[0, 5, 9], &[0, 3, 11]) },
    Case { causal: true, ..in_segments("causal empty segments", QUERIES, KEYS) },
];

const EVERYTHING: Case = Case {
    causal: true,
    left: Some(4),
    soft_cap: Some(2.0),
    slopes: Some(SlopesOf::BatchAndHeads),
    sinks: Some(0.5),
    ..case("everything", CACHED)
};

/// Several options at a time.
pub(crate) const COMBINED: &[Case] = &[
    Case { causal: true, left: Some(3), ..sunk("window and sinks", [1, 8, 2, 9, 14, 64, 64], 1.0) },
    Case {
        causal: true,
        left: Some(4),
        scale: None,
        ..capped("window and cap", [1, 4, 2, 9, 9, 256, 256])
    },
    Case { causal: true, left: Some(2), ..sloped("window and slopes", CACHED, SlopesOf::Heads) },
    Case {
        right: Some(1),
        ..sloped("window and slopes, more queries", MORE_QUERIES, SlopesOf::Heads)
    },
    Case {
        mask: Some(additive(&[2, 1, 9, 9], -INF, third_row)),
        soft_cap: Some(3.0),
        ..sunk("sinks, cap and additive mask", SQUARE, 0.0)
    },
    Case {
        mask: Some(boolean(&[1, 1, 12, 7], third_row)),
        ..sunk("sinks and hidden rows", MORE_QUERIES, -1.0)
    },
    Case {
        mask: Some(additive(&[12, 7], -1e38, third_row)),
        causal: true,
        ..sloped("slopes, additive mask and hidden rows", MORE_QUERIES, SlopesOf::BatchAndHeads)
    },
    Case {
        mask: Some(boolean(&[12], first_keys)),
        causal: true,
        left: Some(2),
        ..case("hidden by mask and window together", CACHED)
    },
    Case {
        left: Some(1),
        right: Some(2),
        sinks: Some(0.0),
        ..in_segments("segments, window and sinks", QUERIES, KEYS)
    },
    Case {
        mask: Some(boolean(&[4, 9, 11], third_row)),
        causal: true,
        ..in_segments("segments and boolean mask", &[0, 5, 9], &[0, 3, 11])
    },
    Case {
        slopes: Some(SlopesOf::Heads),
        causal: true,
        left: Some(2),
        ..in_segments("segments, slopes and window", &[0, 4, 9], &[0, 5, 11])
    },
    Case { mask: Some(additive(&[2, 4, 7, 12], -INF, third_row)), ..EVERYTHING },
    Case { mask: Some(boolean(&[7, 12], some)), strided: true, ..EVERYTHING },
    Case { sizes: Sizes([2, 8, 1, 1, 65, 128, 128]), name: "everything in a decode", ..EVERYTHING },
    Case {
        sizes: Sizes(MORE_QUERIES),
        name: "everything with more queries",
        right: Some(0),
        ..EVERYTHING
    },
    Case {
        name: "everything in segments",
        sizes: Sizes([1, 4, 2, 9, 11, 80, 48]),
        mask: Some(additive(&[9, 11], -40000.0, third_row)),
        segments: Some([QUERIES, KEYS]),
        ..EVERYTHING
    },
    Case {
        name: "everything but causality in segments",
        sizes: Sizes([1, 4, 4, 9, 11, 32, 32]),
        causal: false,
        right: Some(1),
        scale: Some(-0.3),
        segments: Some([QUERIES, KEYS]),
        ..EVERYTHING
    },
];
