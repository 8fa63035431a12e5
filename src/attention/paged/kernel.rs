//! One sweep over the blocks of all sequences, and where their keys are split another over what it found.

use mlx_rs::{Array, Dtype};

use super::{
    problem::{Operands, Problem, Rule},
    reference,
};
use crate::{
    attention::{
        decode::{self, CONSTANTS_OVER_BLOCKS, FRAGMENTS, MAX_KEYS, MAX_SIZE, Shape, Split},
        heads::with_positive_scale,
    },
    error::Result,
    kernel::{self, Argument, Constant, Kernel, Plan, differentiable_by_reference, metal},
    target::Target,
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&WHOLE, &PART];

static WHOLE: Kernel = Kernel {
    name: "paged_attention",
    inputs: &[
        Argument::of("T", "queries", &["N", "H", "D"]).strided(),
        Argument::any("E", "keys", &["M", "B", "K", "D"]).strided(),
        Argument::any("F", "values", &["M", "B", "K", "V"]).strided(),
        Argument::fixed(Dtype::Int32, "starts", &["any starts"]),
        Argument::fixed(Dtype::Int32, "tables", &["C", "W"]),
        Argument::fixed(Dtype::Int32, "lengths", &["C"]),
        Argument::fixed(Dtype::Float32, "key_scales", &["any of keys", "by key", "heads of keys"])
            .strided(),
        Argument::fixed(
            Dtype::Float32,
            "value_scales",
            &["any of values", "by value", "heads of values"],
        )
        .strided(),
        Argument::fixed(Dtype::Float32, "slopes", &["any slopes"]),
        Argument::fixed(Dtype::Float32, "sinks", &["any sinks"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["P", "N", "H", "V"]),
        Argument::fixed(Dtype::Float32, "lse", &["P", "N", "H"]),
    ],
    constants: CONSTANTS_OVER_BLOCKS,
    fragments: FRAGMENTS,
    file: metal!("attention/paged.metal"),
};

static PART: Kernel = Kernel {
    name: "paged_attention_part",
    outputs: &[
        Argument::fixed(Dtype::Float32, "y", &["P", "N", "H", "V"]),
        Argument::fixed(Dtype::Float32, "lse", &["P", "N", "H"]),
    ],
    ..WHOLE
};

pub(super) fn refusal(problem: &Problem) -> Option<&'static str> {
    let Operands { queries, keys, values, tables, .. } = &problem.operands;
    let largest = keys.dim(3).max(values.dim(3));
    let most = i64::from(tables.dim(1)) * i64::from(keys.dim(1));
    let rows = queries.size() / queries.dim(2).max(1).unsigned_abs() as usize;
    [
        (largest > MAX_SIZE, "the kernel takes heads of 256 at most"),
        (most > MAX_KEYS.into(), "the kernel takes no more than 2^29 keys"),
        (
            rows + tables.dim(0).unsigned_abs() as usize > 1 << 22,
            "the kernel takes no more than 2^22 rows",
        ),
    ]
    .into_iter()
    .find_map(|(holds, reason)| holds.then_some(reason))
    .or_else(|| kernel::refusal([queries, keys, values, tables]))
}

/// `[T, H, D_v]` of the dtype of the queries, and `[T, H]`, f32.
pub(super) fn attend(problem: &Problem) -> Result<[Array; 2]> {
    let rule = problem.rule;
    differentiable_by_reference(
        problem.operands.in_order(),
        move |arrays| forward(&Operands::of(arrays), &rule),
        move |arrays| reference::attend(&Operands::of(arrays), &rule),
    )
}

fn forward(operands: &Operands<&Array>, rule: &Rule) -> Result<[Array; 2]> {
    let (queries, scale) = with_positive_scale(operands.queries, rule.scale)?;
    let [slopes, sinks] = [operands.slopes, operands.sinks].map(|x| x.as_dtype(Dtype::Float32));
    let (slopes, sinks) = (slopes?, sinks?);
    let shape = shape(operands);
    let split = Split::new(shape, Target::current()?);
    let inputs = [
        &queries,
        operands.keys,
        operands.values,
        operands.starts,
        operands.tables,
        operands.lengths,
        operands.key_scales,
        operands.value_scales,
        &slopes,
        &sinks,
    ];
    let plan = |sinks| plan(operands, split, &Rule { scale, sinks, ..*rule });
    let [y, lse] = if split.is_whole() {
        WHOLE.call(&inputs, plan(rule.sinks))?
    } else {
        let [parts, lses] = PART.call(&inputs, plan(false))?;
        decode::merged(&queries.expand_dims(2)?, [parts, lses], &sinks, rule.sinks)?
    };
    let result = [queries.dim(0), queries.dim(1), shape.value_size];
    Ok([y.reshape(&result)?, lse.reshape(&result[..2])?])
}

/// As if all sequences were of one length, and as long as their tables have room for.
fn shape(operands: &Operands<&Array>) -> Shape {
    let (queries, keys, tables) = (operands.queries, operands.keys, operands.tables);
    let sequences = tables.dim(0);
    let queries_of_each = (queries.dim(0) - 1) / sequences + 1;
    Shape {
        pairs: sequences * keys.dim(2),
        rows: queries.dim(1) / keys.dim(2) * queries_of_each,
        keys: tables.dim(1) * keys.dim(1),
        size: queries.dim(2),
        value_size: operands.values.dim(3),
        dtype: queries.dtype(),
    }
}

fn plan(operands: &Operands<&Array>, split: Split, rule: &Rule) -> Plan {
    let shape = shape(operands);
    let sweep = decode::Rule {
        scale: rule.scale,
        soft_cap: rule.soft_cap,
        window: [rule.window.left, rule.window.right],
        alibi: rule.alibi,
        sinks: rule.sinks,
    };
    let mut constants = split.constants(shape, &sweep);
    constants.push(Constant::Int(operands.keys.dim(1)));
    constants.extend(rule.forms.map(|form| Constant::Bool(form.is_scaled())));
    let key_heads = operands.keys.dim(2);
    let rows = operands.queries.dim(0) * (operands.queries.dim(1) / key_heads);
    // Each sequence but the first may begin a block of rows of its own, and so may queries of none.
    let blocks = rows / split.rows + operands.tables.dim(0) + 1;
    let groups = blocks.unsigned_abs() * key_heads.unsigned_abs();
    Plan { constants, extents: vec![("P", split.parts)], launch: split.launch(groups, shape) }
}
