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
    kernel::{self, Argument, Constant, File, Kernel, Plan, differentiable_by_reference, metal},
    sizes::div_ceil,
    target::Target,
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&WHOLE, &WITH_LSE, &PART];

const OVER_BLOCKS: [File; FRAGMENTS.len() + 1] = before(metal!("common/strided.metal"), FRAGMENTS);
const WITHOUT_LSE: [File; FRAGMENTS.len() + 2] =
    before(metal!("common/without_lse.metal"), &OVER_BLOCKS);

const fn before<const N: usize>(first: File, others: &[File]) -> [File; N] {
    let mut all = [first; N];
    let mut next = 0;
    while next < others.len() {
        all[next + 1] = others[next];
        next += 1;
    }
    all
}

static WITH_LSE: Kernel = Kernel {
    name: "paged_attention_with_lse",
    inputs: &[
        Argument::of("T", "queries", &["N", "H", "D"]).strided(),
        Argument::any("E", "keys", &["M", "B", "K", "D"]).strided(),
        Argument::any("F", "values", &["M", "B", "K", "V"]).strided(),
        Argument::fixed(Dtype::Int32, "starts", &["any starts"]).strided(),
        Argument::fixed(Dtype::Int32, "tables", &["C", "W"]).strided(),
        Argument::fixed(Dtype::Int32, "lengths", &["C"]).strided(),
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
    fragments: &OVER_BLOCKS,
    file: metal!("attention/paged.metal"),
};

static WHOLE: Kernel = Kernel {
    name: "paged_attention",
    outputs: &[Argument::of("T", "y", &["N", "H", "V"])],
    fragments: &WITHOUT_LSE,
    ..WITH_LSE
};

static PART: Kernel = Kernel {
    name: "paged_attention_part",
    outputs: &[
        Argument::fixed(Dtype::Float32, "y", &["P", "N", "H", "V"]),
        Argument::fixed(Dtype::Float32, "lse", &["P", "N", "H"]),
    ],
    ..WITH_LSE
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

/// `[T, H, D_v]` of the dtype of the queries.
pub(super) fn attend(problem: &Problem) -> Result<Array> {
    let rule = problem.rule;
    let [output] = differentiable_by_reference(
        problem.operands.in_order(),
        move |arrays| Sweep::new(&Operands::of(arrays), &rule)?.output(),
        move |arrays| {
            let [output, _] = reference::attend(&Operands::of(arrays), &rule)?;
            Ok([output])
        },
    )?;
    Ok(output)
}

/// The same, and `[T, H]`, f32.
pub(super) fn attend_with_lse(problem: &Problem) -> Result<[Array; 2]> {
    let rule = problem.rule;
    differentiable_by_reference(
        problem.operands.in_order(),
        move |arrays| Sweep::new(&Operands::of(arrays), &rule)?.output_and_lse(),
        move |arrays| reference::attend(&Operands::of(arrays), &rule),
    )
}

/// A launch in the making.
struct Sweep<'a> {
    operands: Operands<&'a Array>,
    /// With a scale that is not below zero.
    queries: Array,
    slopes: Array,
    sinks: Array,
    rule: Rule,
    split: Split,
}

impl<'a> Sweep<'a> {
    fn new(operands: &Operands<&'a Array>, rule: &Rule) -> Result<Self> {
        let (queries, scale) = with_positive_scale(operands.queries, rule.scale)?;
        let [slopes, sinks] = [operands.slopes, operands.sinks].map(|x| x.as_dtype(Dtype::Float32));
        let split = Split::new(shape(operands), Target::current()?);
        let rule = Rule { scale, ..*rule };
        Ok(Self { operands: *operands, queries, slopes: slopes?, sinks: sinks?, rule, split })
    }

    fn output(&self) -> Result<[Array; 1]> {
        if self.split.is_whole() {
            return self.call(&WHOLE, self.rule.sinks);
        }
        let [output, _] = self.merged()?;
        Ok([output])
    }

    fn output_and_lse(&self) -> Result<[Array; 2]> {
        if !self.split.is_whole() {
            return self.merged();
        }
        let [output, lse] = self.call(&WITH_LSE, self.rule.sinks)?;
        Ok([output.squeeze_axes(&[0])?, lse.squeeze_axes(&[0])?])
    }

    /// Of all parts of the keys.
    fn merged(&self) -> Result<[Array; 2]> {
        let parts = self.call(&PART, false)?;
        let queries = self.queries.expand_dims(2)?;
        let [output, lse] = decode::merged(&queries, parts, &self.sinks, self.rule.sinks)?;
        let shape = [queries.dim(0), queries.dim(1), self.operands.values.dim(3)];
        Ok([output.reshape(&shape)?, lse.reshape(&shape[..2])?])
    }

    fn call<const M: usize>(&self, kernel: &'static Kernel, sinks: bool) -> Result<[Array; M]> {
        let operands = &self.operands;
        let inputs = [
            &self.queries,
            operands.keys,
            operands.values,
            operands.starts,
            operands.tables,
            operands.lengths,
            operands.key_scales,
            operands.value_scales,
            &self.slopes,
            &self.sinks,
        ];
        kernel.call(&inputs, plan(operands, self.split, &Rule { sinks, ..self.rule }))
    }
}

/// As if all sequences were of one length, and as long as their tables have room for.
fn shape(operands: &Operands<&Array>) -> Shape {
    let (queries, keys, tables) = (operands.queries, operands.keys, operands.tables);
    let sequences = tables.dim(0);
    let queries_of_each = div_ceil(queries.dim(0), sequences);
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
