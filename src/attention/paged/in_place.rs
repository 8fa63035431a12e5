//! New tokens into blocks, where these lie.

use mlx_rs::{Array, Dtype};

use super::BlockForm;
use crate::{
    check::{Check, axes},
    dispatch::Context,
    error::Result,
    kernel::{self, Argument, Constant, Kernel, Launch, Plan, Sole, metal, stand_in},
    rope::Turning,
    uploads,
};

const CHECK: Check = Check::op("append_to_blocks");

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&APPEND, &COPY];

const KEY_POOL: Argument =
    Argument::any("E", "key_pool", &["1", "S", "heads of keys", "D"]).written();
const VALUE_POOL: Argument =
    Argument::any("F", "value_pool", &["1", "S", "heads of keys", "V"]).written();
const KEY_SCALES: Argument =
    Argument::fixed(Dtype::Float32, "key_scales", &["1", "scales of keys", "scaled heads of keys"])
        .written();
const VALUE_SCALES: Argument = Argument::fixed(
    Dtype::Float32,
    "value_scales",
    &["1", "scales of values", "scaled heads of values"],
)
.written();

static APPEND: Kernel = Kernel {
    name: "append_to_blocks",
    inputs: &[
        Argument::of("T", "queries", &["N", "H", "or H", "D"]).strided(),
        Argument::of("T", "keys", &["N", "K", "or K", "D"]).strided(),
        Argument::of("T", "values", &["N", "K", "or K", "V"]).strided(),
        Argument::fixed(Dtype::Int32, "positions", &["any positions"]).strided(),
        Argument::fixed(Dtype::Uint64, "turns", &["any turns"]).strided(),
        Argument::fixed(Dtype::Int32, "slots", &["C"]).strided(),
        KEY_POOL,
        VALUE_POOL,
        KEY_SCALES,
        VALUE_SCALES,
    ],
    outputs: &[Argument::of("T", "passed", &["N", "heads", "D"])],
    constants: &["KEYS_SCALED", "VALUES_SCALED", "DIMS", "INTERLEAVED", "MAGNITUDE"],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/heads.metal"),
        metal!("common/strided.metal"),
    ],
    file: metal!("attention/append.metal"),
};

static COPY: Kernel = Kernel {
    name: "copy_blocks",
    inputs: &[
        Argument::fixed(Dtype::Int32, "from", &["M"]),
        Argument::fixed(Dtype::Int32, "to", &["M"]),
        Argument::of("T", "queries", &["N", "H", "or H", "D of queries"]).strided(),
        Argument::fixed(Dtype::Int32, "slots", &["C"]),
        KEY_POOL,
        VALUE_POOL,
        KEY_SCALES,
        VALUE_SCALES,
    ],
    outputs: &[Argument::fixed(Dtype::Int32, "passed", &["C"])],
    constants: &["KEYS_SCALED", "VALUES_SCALED", "BLOCK"],
    fragments: &[metal!("common/chunk.metal")],
    file: metal!("attention/copy_blocks.metal"),
};

/// Fewer would be passed where a kernel cannot write.
const LEAST: usize = 8;
const SIMDGROUPS: u32 = 4;
/// A block is some kilobytes.
const GROUPS_OF_COPY: u32 = 4;

/// Keys, or values, of a pool: numbers, `[1, SLOTS, H_kv, _]`, and in forms that have some scales, `[1, SLOTS, H_kv]`.
pub(crate) type Pool<'a> = &'a [Array];

/// Why there is no such kernel for these, if there is none.
pub(crate) fn refusal(context: &Context, pools: [Pool; 2]) -> Option<&'static str> {
    let small = pools.into_iter().flatten().any(|array| array.size() < LEAST);
    let small = small.then_some("the kernel takes no pool of fewer than 8 numbers");
    context.obstacle.or(small).or_else(|| kernel::refusal(pools.into_iter().flatten()))
}

/// Writes the keys and values of new tokens into the slots of a pool, and returns the queries, `[T, H, D]`. Queries and keys are
/// turned on the way, if they are to be, from `positions`, `[T]`, i32.
///
/// All are a row for each token in one layout or the other, `[T, H, 1, _]` or `[T, 1, H, _]`, and `slots`, i32, are those of the
/// first tokens; the others go nowhere. Plain blocks are of the dtype of the tokens. Whoever attends to the pools afterwards must
/// do so with the queries that this returns.
///
/// # Errors
/// When shapes or dtypes do not fit, or where [`refusal`] has a reason.
pub(crate) fn append(
    [queries, keys, values]: [&Array; 3],
    turning: Option<(&Turning, &Array)>,
    slots: &Array,
    pools: [Pool; 2],
    sole: Sole,
) -> Result<Array> {
    let [key_pool, value_pool] = pools;
    let [heads, key_heads] = [queries, keys].map(|array| array.dim(1) * array.dim(2));
    let of_pool = key_pool[0].dim(2);
    CHECK.value(key_heads == of_pool, "keys", format_args!("have {of_pool} heads"), key_heads)?;
    let stored = [queries.dtype(), Dtype::Int8, Dtype::Uint8];
    CHECK.dtype_among("key_pool", &key_pool[0], &stored)?;
    CHECK.dtype_among("value_pool", &value_pool[0], &stored)?;
    let [key_scales, value_scales] = [scales(key_pool)?, scales(value_pool)?];
    let (positions, turns) = match turning {
        Some((turning, positions)) => {
            CHECK.shape("positions", positions, axes![queries.dim(0)])?;
            (positions.clone(), turning.frequencies.turns())
        }
        None => (stand_in(Dtype::Int32, 1), uploads::numbers(vec![0])),
    };
    let inputs = [
        queries,
        keys,
        values,
        &positions,
        &turns,
        slots,
        &key_pool[0],
        &value_pool[0],
        &key_scales,
        &value_scales,
    ];
    let turning = turning.map(|(turning, _)| turning);
    let plan = append_plan(queries.dim(0), [heads, key_heads], pools.map(is_scaled), turning);
    let [passed] = APPEND.call_in_place(&inputs, plan, sole)?;
    Ok(passed)
}

/// Copies blocks of a pool, each of `block_size` slots, `from` some `to` others, each `[M]`, i32, and returns `slots`.
///
/// No block may be both copied from and to, or to twice, and whoever writes to the pools afterwards must take the slots that
/// this returns. The copies wait for `queries`, `[T, _, _, _]`, of which nothing is read.
///
/// # Errors
/// When shapes or dtypes do not fit, or where [`refusal`] has a reason.
pub(crate) fn copy(
    [from, to]: [&Array; 2],
    queries: &Array,
    slots: &Array,
    pools: [Pool; 2],
    block_size: i32,
    sole: Sole,
) -> Result<Array> {
    let [key_pool, value_pool] = pools;
    let [key_scales, value_scales] = [scales(key_pool)?, scales(value_pool)?];
    let inputs =
        [from, to, queries, slots, &key_pool[0], &value_pool[0], &key_scales, &value_scales];
    let plan = copy_plan(from.dim(0), block_size, pools.map(is_scaled));
    let [passed] = COPY.call_in_place(&inputs, plan, sole)?;
    Ok(passed)
}

/// A simdgroup for each head of each token, of queries, keys and values.
fn append_plan(
    tokens: i32,
    [heads, key_heads]: [i32; 2],
    scaled: [bool; 2],
    turning: Option<&Turning>,
) -> Plan {
    let of_token = heads + 2 * key_heads;
    let simdgroups = tokens.unsigned_abs().saturating_mul(of_token.unsigned_abs());
    let unturned = [Constant::Int(0), Constant::Bool(false), Constant::Float(1.0)];
    let turned = turning.map_or(unturned, Turning::constants);
    let constants = [&scaled.map(Constant::Bool)[..], &turned].concat();
    let plan = plan([simdgroups.div_ceil(SIMDGROUPS), 1, 1], constants);
    Plan { extents: vec![("heads", heads)], ..plan }
}

/// Some groups for each copy.
fn copy_plan(copies: i32, block_size: i32, [keys, values]: [bool; 2]) -> Plan {
    let constants = vec![Constant::Bool(keys), Constant::Bool(values), Constant::Int(block_size)];
    plan([GROUPS_OF_COPY, copies.unsigned_abs(), 1], constants)
}

fn plan(groups: [u32; 3], constants: Vec<Constant>) -> Plan {
    let launch = Launch { groups, group: [32 * SIMDGROUPS, 1, 1], threadgroup_bytes: 0 };
    Plan { constants, extents: Vec::new(), launch }
}

fn is_scaled(pool: Pool) -> bool {
    BlockForm::of(pool[0].dtype()).is_scaled()
}

/// The scales of a pool; of plain numbers some that nobody reads or writes.
fn scales(pool: Pool) -> Result<Array> {
    if !is_scaled(pool) {
        return Ok(uploads::zeros(Dtype::Float32, &[1, LEAST as i32, 1]));
    }
    let expected = "have scales";
    let scales = CHECK.known(pool.get(1), "a pool of 8 bits", expected, "none")?;
    CHECK.shape("scales", scales, axes![1, pool[0].dim(1), pool[0].dim(2)])?;
    Ok(scales.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::{RopeFrequencies, RopeOptions, RopeStyle};

    #[test]
    fn each_head_of_each_token_has_a_simdgroup() {
        for (tokens, heads, key_heads) in [(1, 1, 1), (1, 32, 4), (7, 32, 8), (2048, 9, 2)] {
            let launch = append_plan(tokens, [heads, key_heads], [false; 2], None).launch;
            let simdgroups = launch.groups[0] * launch.group[0] / 32;
            let needed = (tokens * (heads + 2 * key_heads)) as u32;
            assert!((needed..needed + SIMDGROUPS).contains(&simdgroups), "{tokens} {heads}");
        }
    }

    #[test]
    fn a_kernel_is_told_how_to_turn() -> Result<()> {
        let mut frequencies = RopeFrequencies::from(vec![1.0, 0.5]);
        frequencies.magnitude = 1.25;
        let options = RopeOptions {
            dims: Some(4),
            style: RopeStyle::Interleaved,
            frequencies: Some(frequencies),
            ..Default::default()
        };
        let turning = Turning::new(CHECK, options, 6)?;
        let plan = append_plan(1, [4, 2], [true, false], Some(&turning));
        let turned = [Constant::Int(4), Constant::Bool(true), Constant::Float(1.25)];
        assert_eq!(plan.constants[2..], turned);
        assert_eq!(plan.constants[..2], [Constant::Bool(true), Constant::Bool(false)]);
        let plan = append_plan(1, [4, 2], [false; 2], None);
        assert_eq!(plan.constants[2], Constant::Int(0));
        Ok(())
    }

    #[test]
    fn each_copy_has_groups_of_its_own() {
        let plan = copy_plan(5, 16, [true, false]);
        assert_eq!(plan.launch.groups, [GROUPS_OF_COPY, 5, 1]);
        let constants = [Constant::Bool(true), Constant::Bool(false), Constant::Int(16)];
        assert_eq!(plan.constants, constants);
    }
}
