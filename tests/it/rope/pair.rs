//! Queries and keys of the same tokens, for the operations that take both.

use mlx_primitives::{
    Layout,
    rope::{RopeOffset, RopeStyle},
};
use mlx_rs::{Array, Dtype, ops::concatenate};

use super::oracle::Oracle;
use crate::support::{
    FLOATING,
    sample::{normal, strided},
    tensor::Tensor,
};

pub(super) const STYLES: [RopeStyle; 2] = [RopeStyle::HalfSplit, RopeStyle::Interleaved];
pub(super) const LAYOUTS: [Layout; 2] = [Layout::Bshd, Layout::Bhsd];

pub(super) struct Case {
    pub(super) name: &'static str,
    /// `[B, S, H, H_kv, D]`.
    shape: [i32; 5],
    pub(super) dims: Option<i32>,
    start: Start,
    strided: bool,
    dtypes: &'static [Dtype],
    styles: &'static [RopeStyle],
}

#[derive(Clone, Copy)]
enum Start {
    At(i32),
    PerRow(&'static [i32]),
}
use Start::{At, PerRow};

const fn case(name: &'static str, shape: [i32; 5], start: Start) -> Case {
    let (dtypes, styles) = (F32, HALF_SPLIT);
    Case { name, shape, dims: None, start, strided: false, dtypes, styles }
}

const F32: &[Dtype] = &[Dtype::Float32];
const F16: &[Dtype] = &[Dtype::Float16];
const BF16: &[Dtype] = &[Dtype::Bfloat16];
const HALF_SPLIT: &[RopeStyle] = &[RopeStyle::HalfSplit];
const INTERLEAVED: &[RopeStyle] = &[RopeStyle::Interleaved];

/// Every variant of a kernel is compiled and run in every build, which takes seconds: so there is a case for every
/// style and dtype, and not every case has them all.
pub(super) const CASES: &[Case] = &[
    case("fewer than eight elements", [1, 1, 1, 1, 2], At(1)),
    Case {
        dtypes: &FLOATING,
        ..case("head 128, ragged sets of heads", [2, 3, 18, 1, 128], At(4095))
    },
    case("head 64, more keys", [1, 33, 2, 5, 64], PerRow(&[9])),
    Case {
        dims: Some(32),
        dtypes: F16,
        styles: &STYLES,
        ..case("part of a head", [2, 5, 3, 1, 80], At(7))
    },
    Case {
        dims: Some(6),
        dtypes: BF16,
        styles: INTERLEAVED,
        ..case("an odd part of an odd head", [2, 3, 5, 2, 65], PerRow(&[100_000, 1]))
    },
    Case { dtypes: F16, ..case("head 1000", [1, 2, 3, 1, 1000], At(63)) },
    case("head 1024", [1, 1, 2, 2, 1024], At(8)),
    case("position 10^6", [1, 3, 2, 1, 64], At(1_000_000)),
    case("before position 0", [2, 3, 2, 1, 64], At(-100_000)),
    case("beyond i32", [1, 3, 2, 1, 64], At(i32::MAX - 1)),
    case("as many rows as steps and heads", [3, 3, 3, 3, 64], PerRow(&[0, 10, 20])),
    Case { strided: true, ..case("strided", [2, 5, 3, 1, 64], At(7)) },
];

impl Case {
    /// Runs `check` on every style, layout and dtype of the case.
    pub(super) fn each(&self, check: impl Fn(RopeStyle, Layout, Dtype)) {
        for &style in self.styles {
            for layout in LAYOUTS {
                for &dtype in self.dtypes {
                    check(style, layout, dtype);
                }
            }
        }
    }

    /// Queries and keys.
    pub(super) fn arrays(&self, layout: Layout, dtype: Dtype) -> [Array; 2] {
        let [batch, steps, heads, kv_heads, size] = self.shape;
        [(1, heads), (2, kv_heads)].map(|(seed, heads)| {
            let shape = match layout {
                Layout::Bshd => [batch, steps, heads, size],
                Layout::Bhsd => [batch, heads, steps, size],
            };
            let x = normal(seed, &shape, dtype);
            if self.strided { strided(&x) } else { x }
        })
    }

    pub(super) fn size(&self) -> i32 {
        self.shape[4]
    }

    pub(super) fn oracle(&self, style: RopeStyle, layout: Layout) -> Oracle {
        let [batch, .., size] = self.shape;
        let oracle = Oracle::new(style, self.dims.unwrap_or(size), batch, 0);
        let starts = match self.start {
            At(start) => vec![start.into(); batch as usize],
            PerRow(starts) => starts.iter().map(|&start| start.into()).collect(),
        };
        Oracle { layout, starts, ..oracle }
    }

    /// Calls `run` with the offset.
    pub(super) fn with_offset<T>(&self, run: impl Fn(RopeOffset) -> T) -> T {
        match self.start {
            At(start) => run(RopeOffset::At(start)),
            PerRow(rows) => run(RopeOffset::PerRow(&Array::from_slice(rows, &[rows.len() as i32]))),
        }
    }
}

/// Both one after the other in one row, which is what the helpers of tests compare.
pub(super) fn in_one((queries, keys): (Array, Array)) -> mlx_primitives::Result<Array> {
    let rows = [queries.reshape(&[-1])?, keys.reshape(&[-1])?];
    Ok(concatenate(&rows, 0)?)
}

pub(super) fn tensors_in_one(tensors: [Tensor; 2]) -> Tensor {
    let values = tensors.into_iter().flat_map(|tensor| tensor.values).collect::<Vec<_>>();
    Tensor::new(&[values.len()], values)
}
