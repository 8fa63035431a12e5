//! Few queries over many keys: the kernel, for whoever has checked the problem.

mod plan;

use mlx_rs::{Array, Dtype, ops::broadcast_to};

use self::plan::CONSTANTS;
pub(super) use self::plan::{CONSTANTS_OVER_BLOCKS, Rule, Shape, Split};
use crate::{
    error::Result,
    kernel::{Argument, File, Kernel, Plan, metal, stand_in},
    target::Target,
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&WHOLE, &PART, &MERGE];

/// More of a head than a lane can hold is refused.
pub(super) const MAX_SIZE: i32 = 256;
/// Queries up to which reading the keys is all the work there is.
const MAX_QUERIES: i32 = 8;
/// Keys up to which a position, give or take a window, is an `int`.
pub(super) const MAX_KEYS: i32 = 1 << 29;

/// What every kernel that sweeps over keys is made of.
pub(super) const FRAGMENTS: &[File] = &[
    metal!("common/part.metal"),
    metal!("common/base.metal"),
    metal!("common/attend.metal"),
    metal!("common/tile_sweep.metal"),
    metal!("common/lane_sweep.metal"),
    metal!("common/sweep.metal"),
];

static WHOLE: Kernel = Kernel {
    name: "decode_attention",
    inputs: &[
        Argument::of("T", "queries", &["B", "H", "Q", "D"]).strided(),
        Argument::of("T", "keys", &["B", "K", "S", "D"]).strided(),
        Argument::of("T", "values", &["B", "K", "S", "V"]).strided(),
        Argument::fixed(Dtype::Float32, "slopes", &["any batch", "any heads"]),
        Argument::fixed(Dtype::Float32, "sinks", &["any sinks"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["P", "B", "H", "Q", "V"]),
        Argument::fixed(Dtype::Float32, "lse", &["P", "B", "H", "Q"]),
    ],
    constants: CONSTANTS,
    fragments: FRAGMENTS,
    file: metal!("attention/decode.metal"),
};

static PART: Kernel = Kernel {
    name: "decode_attention_part",
    outputs: &[
        Argument::fixed(Dtype::Float32, "y", &["P", "B", "H", "Q", "V"]),
        Argument::fixed(Dtype::Float32, "lse", &["P", "B", "H", "Q"]),
    ],
    ..WHOLE
};

/// Puts parts together; `queries` are there for their type.
static MERGE: Kernel = Kernel {
    name: "merge_decode_attention",
    inputs: &[
        Argument::of("T", "queries", &["B", "H", "Q", "D"]).strided(),
        Argument::fixed(Dtype::Float32, "parts", &["P", "N", "V"]),
        Argument::fixed(Dtype::Float32, "lses", &["P", "N"]),
        Argument::fixed(Dtype::Float32, "sinks", &["any sinks"]),
    ],
    outputs: &[Argument::of("T", "y", &["N", "V"]), Argument::fixed(Dtype::Float32, "lse", &["N"])],
    constants: &["SIMDS", "VALUE_SIZE", "INNER", "SINKS"],
    fragments: &[
        metal!("common/part.metal"),
        metal!("common/base.metal"),
        metal!("common/attend.metal"),
    ],
    file: metal!("attention/merge.metal"),
};

/// A problem that someone has checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decode<'a> {
    /// `[B, H, S_q, D]`, as it lies in memory.
    pub(super) queries: &'a Array,
    /// `[B, H_kv, S_kv, D]`, likewise.
    pub(super) keys: &'a Array,
    /// `[B, H_kv, S_kv, D_v]`, likewise.
    pub(super) values: &'a Array,
    /// What scores are multiplied by: not below zero.
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
    /// Keys before the query's own place, and after it.
    pub(super) window: [Option<i32>; 2],
    /// `[H]` or `[B, H]`.
    pub(super) slopes: Option<&'a Array>,
    /// `[H]`.
    pub(super) sinks: Option<&'a Array>,
}

/// Whether reading the keys is all the work there is, for heads of which the larger have `size` elements.
pub(super) fn pays(queries: i32, keys: i32, size: i32) -> bool {
    queries <= MAX_QUERIES && keys <= MAX_KEYS && size <= MAX_SIZE
}

impl Decode<'_> {
    /// `[B, H, S_q, D_v]` of the dtype of the queries, and its log-sum-exp, `[B, H, S_q]`, f32.
    pub(super) fn attend(&self) -> Result<[Array; 2]> {
        let (shape, value_size) = (self.queries.shape(), self.values.dim(-1));
        let rule = Rule {
            scale: self.scale,
            soft_cap: self.soft_cap,
            window: self.window,
            alibi: self.slopes.is_some(),
            sinks: self.sinks.is_some(),
        };
        let split = Split::new(self.shape(), Target::current()?);
        let slopes = slopes_by_sequence(self.slopes, [shape[0], shape[1]])?;
        let sinks = floats_or_stand_in(self.sinks)?;
        let inputs = [self.queries, self.keys, self.values, &slopes, &sinks];
        let (y, lse) = if split.is_whole() {
            let [y, lse] = WHOLE.call(&inputs, self.plan(split, &rule))?;
            (y, lse)
        } else {
            let rule = Rule { sinks: false, ..rule };
            let [parts, lses] = PART.call(&inputs, self.plan(split, &rule))?;
            let [y, lse] = merged(self.queries, [parts, lses], &sinks, self.sinks.is_some())?;
            (y, lse)
        };
        let result = [shape[0], shape[1], shape[2], value_size];
        Ok([y.reshape(&result)?, lse.reshape(&result[..3])?])
    }

    fn shape(&self) -> Shape {
        let (queries, keys) = (self.queries.shape(), self.keys.shape());
        Shape {
            pairs: queries[0] * keys[1],
            rows: queries[1] / keys[1] * queries[2],
            keys: self.visible_keys(),
            size: queries[3],
            value_size: self.values.dim(-1),
            dtype: self.queries.dtype(),
        }
    }

    /// The most keys that a query and its neighbours see.
    fn visible_keys(&self) -> i32 {
        let (queries, keys) = (self.queries.dim(2), self.keys.dim(2));
        let [left, right] = self.window;
        left.map_or(keys, |left| {
            let beside = right.unwrap_or(queries).saturating_add(queries);
            left.saturating_add(beside).clamp(1, keys)
        })
    }

    fn plan(&self, split: Split, rule: &Rule) -> Plan {
        let shape = self.shape();
        let groups = shape.pairs.unsigned_abs()
            * shape.rows.unsigned_abs().div_ceil(split.rows.unsigned_abs());
        Plan {
            constants: split.constants(shape, rule),
            extents: vec![("P", split.parts)],
            launch: split.launch(groups, shape),
        }
    }
}

/// What parts of the keys come to, for `queries`, `[B, H, Q, D]`: of results, `[P, ..., V]`, and log-sum-exps, `[P, ...]`, of
/// as many rows, `[N, V]` of the dtype of the queries and `[N]`.
pub(super) fn merged(
    queries: &Array,
    [parts, lses]: [Array; 2],
    sinks: &Array,
    has_sinks: bool,
) -> Result<[Array; 2]> {
    let [rows, inner] = [queries.dim(0) * queries.dim(1) * queries.dim(2), queries.dim(2)];
    let (count, size) = (parts.dim(0), parts.dim(-1));
    let (parts, lses) = (parts.reshape(&[count, rows, size])?, lses.reshape(&[count, rows])?);
    let plan = plan::merge(rows, inner, size, has_sinks);
    MERGE.call(&[queries, &parts, &lses, sinks], plan)
}

/// `[B, H]`, f32, of `[H]` or `[B, H]`.
pub(super) fn slopes_by_sequence(slopes: Option<&Array>, shape: [i32; 2]) -> Result<Array> {
    let Some(slopes) = slopes else { return Ok(stand_in(Dtype::Float32, 2)) };
    Ok(broadcast_to(slopes.as_dtype(Dtype::Float32)?, &shape)?)
}

pub(super) fn floats_or_stand_in(array: Option<&Array>) -> Result<Array> {
    Ok(array
        .map_or_else(|| Ok(stand_in(Dtype::Float32, 1)), |array| array.as_dtype(Dtype::Float32))?)
}
