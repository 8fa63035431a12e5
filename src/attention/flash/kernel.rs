//! One pass over keys and values, and two back, by kernels of this crate that hold no matrix of scores.

use std::f32::consts::LOG2_E;

use mlx_rs::{
    Array, Dtype,
    ops::{exp, select, zeros_like},
};

use super::{
    blocks,
    dims::Dims,
    options::{FlashAttentionOptions, Segments, Window},
    plan::{Blocks, Teams, padded_sizes},
    problem::{self, Attended, Problem},
    visible::with_rank_4,
};
use crate::{
    attention::decode::{self, Decode},
    attention::heads::with_positive_scale,
    error::Result,
    kernel::{
        self, Argument, Constant, File, Kernel, Launch, Plan, Vjp, differentiable,
        differentiable_by_reference, metal, refusal as array_refusal, stand_in,
    },
    layout::Layout,
    target::Target,
    uploads,
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] =
    &[&FORWARD, &FORWARD_OF_TEAMS, &BACKWARD_QUERIES, &BACKWARD_KEYS];

const QUERIES: Argument = Argument::of("T", "queries", &["B", "X", "Y", "D"]);
const KEYS: Argument = Argument::of("T", "keys", &["B", "Z", "W", "D"]);
const VALUES: Argument = Argument::of("T", "values", &["B", "Z", "W", "V"]);
const MASK: Argument = Argument::of("T", "mask", &["A", "E", "F", "G"]);
const SLOPES: Argument = Argument::fixed(Dtype::Float32, "slopes", &["I", "J"]);
const QUERY_STARTS: Argument = Argument::fixed(Dtype::Int32, "query_starts", &["P"]);
const KEY_STARTS: Argument = Argument::fixed(Dtype::Int32, "key_starts", &["P"]);
const DY: Argument = Argument::of("T", "dy", &["B", "X", "Y", "V"]);
const LSE: Argument = Argument::fixed(Dtype::Float32, "lse", &["B", "H", "S"]);
const DELTA: Argument = Argument::fixed(Dtype::Float32, "delta", &["B", "H", "S"]);

static FORWARD: Kernel = Kernel {
    name: "flash_attention",
    inputs: &[
        QUERIES,
        KEYS,
        VALUES,
        MASK,
        SLOPES,
        Argument::fixed(Dtype::Float32, "sinks", &["N"]),
        QUERY_STARTS,
        KEY_STARTS,
    ],
    outputs: &[Argument::of("T", "y", &["B", "X", "Y", "V"]), LSE],
    constants: CONSTANTS,
    fragments: FRAGMENTS.split_at(6).0,
    file: metal!("attention/flash.metal"),
};

static FORWARD_OF_TEAMS: Kernel = Kernel {
    name: "flash_attention_of_teams",
    constants: TEAM_CONSTANTS,
    fragments: FRAGMENTS,
    file: metal!("attention/flash_team.metal"),
    ..FORWARD
};

static BACKWARD_QUERIES: Kernel = Kernel {
    name: "flash_attention_backward_queries",
    inputs: BACKWARD_INPUTS,
    outputs: &[
        Argument::of("T", "dqueries", &["B", "X", "Y", "D"]),
        Argument::fixed(Dtype::Float32, "dslopes", &["B", "H", "R"]),
    ],
    constants: BACKWARD_CONSTANTS,
    fragments: FRAGMENTS.split_at(5).0,
    file: metal!("attention/flash_backward_queries.metal"),
};

static BACKWARD_KEYS: Kernel = Kernel {
    name: "flash_attention_backward_keys",
    inputs: BACKWARD_INPUTS,
    outputs: &[
        Argument::of("T", "dkeys", &["B", "Z", "W", "D"]),
        Argument::of("T", "dvalues", &["B", "Z", "W", "V"]),
    ],
    constants: BACKWARD_CONSTANTS,
    fragments: FRAGMENTS.split_at(5).0,
    file: metal!("attention/flash_backward_keys.metal"),
};

const BACKWARD_INPUTS: &[Argument] =
    &[QUERIES, KEYS, VALUES, MASK, SLOPES, QUERY_STARTS, KEY_STARTS, DY, LSE, DELTA];

/// Each uses those before it: the gradient the first five, single simdgroups six, teams all.
const FRAGMENTS: &[File] = &[
    metal!("common/chunk.metal"),
    metal!("common/tile.metal"),
    metal!("common/staging.metal"),
    metal!("common/base.metal"),
    metal!("common/scores.metal"),
    metal!("common/attend_rows.metal"),
    metal!("common/team.metal"),
];

/// Those of the forward kernel.
#[rustfmt::skip]
const CONSTANTS: &[&str] = &[
    "BUFFERS", "SIMDS", "KEYS", "PAD", "SIZE", "VALUE_SIZE", "TOKEN_MAJOR", "LEFT", "RIGHT", "SEGMENTED", "SCALE",
    "SOFT_CAP", "MASKED", "ALIBI", "SINKS",
];

/// All but the first and the last of these: a sink takes part in the log-sum-exp, which the gradient starts from.
const BACKWARD_CONSTANTS: &[&str] = CONSTANTS.split_at(14).0.split_at(1).1;

/// All but what a group works on, which is fixed.
const TEAM_CONSTANTS: &[&str] = CONSTANTS.split_at(4).1;

/// The largest head: what a simdgroup holds of 16 queries fills its registers.
const MAX_SIZE: i32 = 256;

/// A smaller scale or cap is as good as this one, and what scores are added to may be divided by it.
const LEAST_RATE: f32 = 1e-20;

/// A scale or a cap that the kernels may multiply and divide by, in units of log2(e) too.
fn bounded(rate: f32) -> f32 {
    rate.clamp(LEAST_RATE, f32::MAX / LOG2_E)
}

/// Why the kernels cannot compute this, if they cannot.
pub(super) fn refusal(problem: &Problem) -> Option<&'static str> {
    refusal_of([&problem.queries, &problem.keys, &problem.values], &problem.dims)
        .or_else(|| array_refusal(problem.mask))
        .or(problem.dropout.is_some().then_some("the kernel has no dropout"))
}

/// The same, for queries, keys and values alone.
pub(in crate::attention) fn refusal_of(arrays: [&Array; 3], dims: &Dims) -> Option<&'static str> {
    if dims.size.max(dims.value_size) > MAX_SIZE {
        return Some("the kernel takes heads of at most 256 elements");
    }
    if dims.batch.max(dims.heads).unsigned_abs() > Launch::MAX_GROUPS_ASIDE {
        return Some("the kernel takes no more than 65535 heads or sequences");
    }
    array_refusal(arrays).or_else(|| kernel::refusal_of_result(&dims.result()))
}

/// Whether the kernel is the one that splits keys, for few queries.
pub(super) fn splits_keys(problem: &Problem) -> bool {
    let Dims { query_length, key_length, size, value_size, .. } = problem.dims;
    let pays = decode::pays(query_length, key_length, size.max(value_size));
    pays && problem.mask.is_none() && problem.segments.is_none()
}

/// Computes the result and the log-sum-exp.
pub(super) fn attend(problem: &Problem) -> Result<Attended> {
    let layout = problem.layout;
    // The kernels read either layout, and a scale as the bits of a number that is not below zero.
    let (queries, scale) = with_positive_scale(&problem.queries, problem.scale)?;
    let [queries, keys, values] = [
        layout.swap_with_bhsd(&queries)?,
        layout.swap_with_bhsd(&problem.keys)?,
        layout.swap_with_bhsd(&problem.values)?,
    ];
    let none = Nothing::of(problem.dtype);
    let slopes =
        problem.alibi_slopes.map(|slopes| by_head(slopes, problem.dims.heads)).transpose()?;
    let sinks = problem.sinks.map(wide).transpose()?;
    let mask = problem.mask.map(|mask| additive(mask, problem.dtype)).transpose()?;
    let [query_starts, key_starts] = match problem.segments {
        Some(Segments { queries, keys }) => [queries, keys],
        None => [&none.starts, &none.starts],
    };
    let inputs = [
        &queries,
        &keys,
        &values,
        mask.as_ref().unwrap_or(&none.mask),
        slopes.as_ref().unwrap_or(&none.slopes),
        sinks.as_ref().unwrap_or(&none.sinks),
        query_starts,
        key_starts,
    ];
    let work = Work { scale, ..Work::of(problem) };
    let forward = move |inputs: &[Array; 8]| work.forward(inputs);
    let reference = move |inputs: &[Array; 8]| work.reference(inputs);
    let [output, lse] = match work.has_backward(&inputs) {
        true => differentiable(inputs, forward, move |vjp| work.backward(vjp), reference)?,
        false => differentiable_by_reference(inputs, forward, reference)?,
    };
    Ok(Attended { output: layout.swap_with_bhsd(&output)?, lse: Some(lse) })
}

/// What the kernels compute.
#[derive(Debug, Clone, Copy)]
struct Work {
    scale: f32,
    soft_cap: Option<f32>,
    window: Window,
    layout: Layout,
    /// Whether queries are so few that the kernel splits the keys.
    few: bool,
    present: Present,
}

/// Which of the arrays are there that may be.
#[derive(Debug, Clone, Copy)]
struct Present {
    mask: bool,
    /// Whether there may be a gradient by the mask.
    added_mask: bool,
    slopes: bool,
    sinks: bool,
    segments: bool,
}

/// What stands in for arrays that are not there.
struct Nothing {
    mask: Array,
    slopes: Array,
    sinks: Array,
    starts: Array,
}

impl Nothing {
    fn of(dtype: Dtype) -> Self {
        Self {
            mask: stand_in(dtype, 4),
            slopes: stand_in(Dtype::Float32, 2),
            sinks: stand_in(Dtype::Float32, 1),
            starts: stand_in(Dtype::Int32, 1),
        }
    }
}

impl Work {
    fn of(problem: &Problem) -> Self {
        Self {
            scale: problem.scale,
            soft_cap: problem.soft_cap,
            window: problem.window,
            layout: problem.layout,
            few: splits_keys(problem),
            present: Present {
                mask: problem.mask.is_some(),
                added_mask: problem.mask.is_some_and(|mask| mask.dtype() != Dtype::Bool),
                slopes: problem.alibi_slopes.is_some(),
                sinks: problem.sinks.is_some(),
                segments: problem.segments.is_some(),
            },
        }
    }

    /// Whether its gradient is by kernels too: none of them has that of a mask, which is as large as the scores.
    fn has_backward(self, inputs: &[&Array; 8]) -> bool {
        let sizes = padded_sizes([inputs[0], inputs[2]].map(|array| array.dim(-1)));
        // What fits on one kind of device fits on all.
        let fits =
            Blocks::backward(sizes, inputs[0].dtype(), Target::Metal, Blocks::OF_KEYS).is_ok();
        fits && !self.present.added_mask
    }

    fn forward(self, inputs: &[Array; 8]) -> Result<[Array; 2]> {
        if self.few {
            return self.forward_of_few(inputs);
        }
        let [batch, rows, heads, _] = self.layout.dims(&inputs[0]);
        let sizes = [&inputs[0], &inputs[2]].map(|array| array.dim(-1));
        let (dtype, target) = (inputs[0].dtype(), Target::current()?);
        let (kernel, sizes, geometry, launch) = match Teams::of(sizes, dtype, target, rows) {
            Some(teams) => {
                (&FORWARD_OF_TEAMS, teams.sizes, vec![], teams.launch(rows, heads, batch))
            }
            None => {
                let sizes = padded_sizes(sizes);
                let blocks = Blocks::forward(sizes, dtype, target)?.for_rows(rows);
                let geometry = [vec![Constant::Int(blocks.buffers)], blocks.constants()].concat();
                (&FORWARD, sizes, geometry, blocks.launch(rows, heads, batch))
            }
        };
        let sinks = Constant::Bool(self.present.sinks);
        let constants = [geometry, self.constants(sizes), vec![sinks]].concat();
        let extents = vec![("H", heads), ("S", rows)];
        kernel.call(&inputs.each_ref(), Plan { constants, extents, launch })
    }

    /// For few queries, where to read keys and values is all the work: by a kernel that splits the keys.
    fn forward_of_few(self, inputs: &[Array; 8]) -> Result<[Array; 2]> {
        let [queries, keys, values, _, slopes, sinks, ..] = inputs;
        let bhsd = |array| self.layout.swap_with_bhsd(array);
        let (queries, keys, values) = (bhsd(queries)?, bhsd(keys)?, bhsd(values)?);
        let decode = Decode {
            queries: &queries,
            keys: &keys,
            values: &values,
            scale: self.scale,
            soft_cap: self.soft_cap,
            window: [self.window.left, self.window.right],
            slopes: self.present.slopes.then_some(slopes),
            sinks: self.present.sinks.then_some(sinks),
        };
        let [output, lse] = decode.attend()?;
        Ok([bhsd(&output)?, lse])
    }

    fn reference(self, inputs: &[Array; 8]) -> Result<[Array; 2]> {
        let [queries, keys, values, mask, slopes, sinks, query_starts, key_starts] = inputs;
        let Present { mask: masked, slopes: sloped, sinks: sunk, segments, .. } = self.present;
        let slopes = if slopes.dim(0) == 1 { slopes.squeeze_axes(&[0])? } else { slopes.clone() };
        let options = FlashAttentionOptions {
            scale: Some(self.scale),
            soft_cap: self.soft_cap,
            alibi_slopes: sloped.then_some(&slopes),
            mask: masked.then_some(mask),
            window: self.window,
            segments: segments.then_some(Segments { queries: query_starts, keys: key_starts }),
            sinks: sunk.then_some(sinks),
            layout: self.layout,
            ..Default::default()
        };
        let problem = Problem::new([queries, keys, values], &options, true)?;
        let Attended { output, lse } = problem.in_layout(blocks::by_reference(&problem)?)?;
        Ok([output, lse.ok_or_else(problem::no_lse)?])
    }

    fn backward(self, vjp: Vjp<'_, 8, 2>) -> Result<[Array; 8]> {
        let [queries, keys, values, mask, slopes, sinks, starts, key_starts] = vjp.inputs;
        let ([y, lse], [dy, dlse]) = (vjp.outputs, vjp.cotangents);
        let delta = wide(dy)?.multiply(wide(y)?)?.sum_axis(-1, false)?;
        let delta = match self.layout {
            Layout::Bshd => delta.swap_axes(1, 2)?,
            Layout::Bhsd => delta,
        };
        let delta = delta.subtract(dlse)?;
        let inputs = [queries, keys, values, mask, slopes, starts, key_starts, dy, lse, &delta];

        let [batch, rows, heads, _] = self.layout.dims(queries);
        let [_, key_count, key_heads, _] = self.layout.dims(keys);
        let target = Target::current()?;
        let plan = |rows, heads, extra, extents| -> Result<Plan> {
            let sizes = padded_sizes([queries.dim(-1), values.dim(-1)]);
            let blocks = Blocks::backward(sizes, queries.dtype(), target, extra)?.for_rows(rows);
            let constants = [blocks.constants(), self.constants(sizes)].concat();
            Ok(Plan { constants, extents, launch: blocks.launch(rows, heads, batch) })
        };
        let by_row = vec![("R", if self.present.slopes { rows } else { 1 })];
        let [dqueries, dslopes] = BACKWARD_QUERIES.call(&inputs, plan(rows, heads, 0, by_row)?)?;
        let by_keys = plan(key_count, key_heads, Blocks::OF_KEYS, Vec::new())?;
        let [dkeys, dvalues] = BACKWARD_KEYS.call(&inputs, by_keys)?;
        let dsinks = match self.present.sinks {
            true => sink_gradient(sinks, lse, &delta)?,
            false => zeros_like(sinks)?,
        };
        let dslopes = match self.present.slopes {
            true => slope_gradient(slopes, &dslopes)?,
            false => zeros_like(slopes)?,
        };
        let [dmask, dstarts] = [zeros_like(mask)?, zeros_like(starts)?];
        Ok([dqueries, dkeys, dvalues, dmask, dslopes, dsinks, dstarts, zeros_like(key_starts)?])
    }

    fn constants(self, [size, value_size]: [i32; 2]) -> Vec<Constant> {
        vec![
            Constant::Int(size),
            Constant::Int(value_size),
            Constant::Bool(self.layout == Layout::Bshd),
            Constant::Int(with_diagonal(self.window.left)),
            Constant::Int(with_diagonal(self.window.right)),
            Constant::Bool(self.present.segments),
            Constant::Float(bounded(self.scale)),
            Constant::Float(self.soft_cap.map_or(0.0, bounded)),
            Constant::Bool(self.present.mask),
            Constant::Bool(self.present.slopes),
        ]
    }
}

/// How many keys on one side of the diagonal, it included, as the kernels count; zero for all.
fn with_diagonal(keys: Option<i32>) -> i32 {
    keys.map_or(0, |keys| keys.saturating_add(1))
}

fn wide(x: &Array) -> Result<Array> {
    Ok(x.as_dtype(Dtype::Float32)?)
}

/// `[1, H]` or `[B, H]`, f32.
fn by_head(slopes: &Array, heads: i32) -> Result<Array> {
    Ok(wide(slopes)?.reshape(&[-1, heads])?)
}

/// A mask of rank 4 that is added, of `dtype`.
fn additive(mask: &Array, dtype: Dtype) -> Result<Array> {
    let mask = with_rank_4(mask, dtype)?;
    match mask.dtype() {
        Dtype::Bool => {
            let [shown, hidden] = [0.0, f32::NEG_INFINITY].map(uploads::float);
            Ok(select(&mask, shown, hidden)?.as_dtype(dtype)?)
        }
        _ => Ok(mask),
    }
}

/// From `[B, H, S_q]`, what each query gives, to the shape of the slopes.
fn slope_gradient(slopes: &Array, by_row: &Array) -> Result<Array> {
    let by_batch = by_row.sum_axis(-1, false)?;
    match slopes.dim(0) == by_batch.dim(0) {
        true => Ok(by_batch),
        false => Ok(by_batch.sum_axis(0, true)?),
    }
}

/// `-sum(exp(sink - lse) · delta)` for each head: a sink takes its share from every value, and gives none.
fn sink_gradient(sinks: &Array, lse: &Array, delta: &Array) -> Result<Array> {
    let logits = sinks.reshape(&[1, -1, 1])?.subtract(lse)?;
    let unseen = lse.eq(uploads::float(f32::NEG_INFINITY))?;
    let shares = exp(select(&unseen, uploads::float(f32::NEG_INFINITY), logits)?)?;
    Ok(shares.multiply(delta)?.sum_axes(&[0, 2], false)?.negative()?)
}
