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

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) sizes: Sizes,
    pub(crate) causal: bool,
    pub(crate) scale: Option<f32>,
    pub(crate) mask: Option<MaskOf>,
    pub(crate) strided: bool,
}

const fn case(name: &'static str, sizes: [i32; 7]) -> Case {
    let sizes = Sizes(sizes);
    Case { name, sizes, causal: false, scale: None, mask: None, strided: false }
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
fn some(index: &[usize]) -> bool {
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
