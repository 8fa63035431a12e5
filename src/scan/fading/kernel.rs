//! One pass over a sequence that keeps its states in registers.

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, maximum},
};

use super::NOTHING_LEFT;
use crate::{
    check::Check,
    dispatch::Context,
    error::Result,
    kernel::{self, Argument, Constant, Kernel, Launch, Plan, TILE, metal, simds_for, stand_in},
    sizes::padded,
    target::Target,
    uploads,
};

/// The kernels of these operations.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD];

static FORWARD: Kernel = Kernel {
    name: "fading_scan",
    inputs: &[
        Argument::of("T", "queries", &["B", "L", "G", "K"]),
        Argument::of("T", "keys", &["B", "L", "G", "K"]),
        Argument::of("T", "values", &["B", "L", "H", "V"]),
        Argument::fixed(Dtype::Float32, "decays", &["B", "H", "L"]),
        Argument::fixed(Dtype::Float32, "steps", &["any steps"]),
        Argument::fixed(Dtype::Float32, "state", &["any state"]),
        Argument::fixed(Dtype::Float32, "skip", &["any skip"]),
        Argument::of("Z", "gate", &["any gate"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["B", "L", "H", "V"]),
        Argument::fixed(Dtype::Float32, "last", &["B", "H", "V", "K"]),
    ],
    constants: &[
        "BUFFERS", "SIMDS", "STEPS", "PAD", "SIZE", "SCALE", "STEPPED", "STARTED", "SKIPS", "GATED",
    ],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/tile.metal"),
        metal!("common/staging.metal"),
        metal!("common/curve.metal"),
    ],
    file: metal!("scan/fading_scan.metal"),
};

const CHECK: Check = Check::op(FORWARD.name);

/// The largest key: what a simdgroup holds of 16 rows of a state fills its registers.
const MAX_KEY: i32 = 256;

/// What the kernel scans: one decay a head and step, no segments.
pub(in crate::scan) struct FadingScan<'a> {
    /// `[B, L, G, K]`
    pub(in crate::scan) queries: &'a Array,
    /// `[B, L, G, K]`
    pub(in crate::scan) keys: &'a Array,
    /// `[B, L, H, V]`
    pub(in crate::scan) values: &'a Array,
    /// `[B, L, H]`: logarithms of decays.
    pub(in crate::scan) decays: Array,
    /// `[B, L, H]`: what values are multiplied by as they are written.
    pub(in crate::scan) steps: Option<Array>,
    /// What is read is multiplied by this, which is not below zero.
    pub(in crate::scan) scale: f32,
    /// `[H]` or `[H, V]`: how much of a value is added to what is read.
    pub(in crate::scan) skip: Option<&'a Array>,
    /// `[B, L, H, V]`: of which the result is multiplied by the silu.
    pub(in crate::scan) gate: Option<&'a Array>,
    /// `[B, H, V, K]`
    pub(in crate::scan) state: Option<Array>,
}

/// Whether the kernel was measured to be faster than plain ops. They work on all chunks of a sequence at once and it does not,
/// so that what counts are the rows of all states.
pub(in crate::scan) fn wins(values: &Array, context: &Context) -> bool {
    let op = match values.dtype() {
        Dtype::Float32 => "fading_scan in f32",
        _ => FORWARD.name,
    };
    let length = values.dim(1);
    let rows = values.size() / length.max(1).unsigned_abs() as usize;
    length >= context.settings.min_seq_for_metal && context.kernel_wins(op, rows)
}

/// Why the kernel cannot take keys and values of these shapes, if it cannot.
pub(in crate::scan) fn refusal(
    keys: &Array,
    values: &Array,
    target: Target,
) -> Option<&'static str> {
    let [batch, _, heads, value_size] = sizes(values);
    let size = keys.dim(3);
    if size > MAX_KEY {
        return Some("the kernel takes keys of at most 256 elements");
    }
    if batch.max(heads).unsigned_abs() > Launch::MAX_GROUPS_ASIDE {
        return Some("the kernel takes no more than 65535 heads or sequences");
    }
    let refusal = kernel::refusal([keys, values])
        .or_else(|| kernel::refusal_of_result(&[batch, heads, value_size, size]));
    if refusal.is_none() && Blocks::fitting([size, value_size], values.dtype(), target).is_none() {
        return Some("its states exceed threadgroup memory");
    }
    refusal
}

fn sizes(array: &Array) -> [i32; 4] {
    [0, 1, 2, 3].map(|axis| array.dim(axis))
}

impl FadingScan<'_> {
    /// What is read, `[B, L, H, V]`, and the state after the last step, `[B, H, V, K]`.
    pub(in crate::scan) fn run(&self) -> Result<[Array; 2]> {
        let [batch, _, heads, value_size] = sizes(self.values);
        let dtype = self.values.dtype();
        let target = Target::current()?;
        let by_head = |array: &Array| array.swap_axes(1, 2);
        let wide = |array: &Array| array.as_dtype(Dtype::Float32);
        let flat = |array: Array| array.flatten(None, None);
        let decays = maximum(wide(&self.decays)?, uploads::float(NOTHING_LEFT))?;
        let steps = self.steps.as_ref().map(|steps| flat(by_head(&wide(steps)?)?)).transpose()?;
        let state = self.state.as_ref().map(|state| flat(wide(state)?)).transpose()?;
        let skip =
            self.skip.map(|skip| by_element(&wide(skip)?, [heads, value_size])).transpose()?;
        let gate = self.gate.map(|gate| flat(gate.clone())).transpose()?;
        let (none, ungated) = (stand_in(Dtype::Float32, 1), stand_in(dtype, 1));
        let [queries, keys] = [self.queries, self.keys].map(|array| array.as_dtype(dtype));
        let inputs = [
            &queries?,
            &keys?,
            self.values,
            &by_head(&decays)?,
            steps.as_ref().unwrap_or(&none),
            state.as_ref().unwrap_or(&none),
            skip.as_ref().unwrap_or(&none),
            gate.as_ref().unwrap_or(&ungated),
        ];
        let size = self.keys.dim(3);
        let blocks = Blocks::fitting([size, value_size], dtype, target);
        let blocks = CHECK.known(blocks, "keys", "fit threadgroup memory", size)?;
        let present = [steps.is_some(), state.is_some(), skip.is_some(), self.gate.is_some()];
        let constants = [
            [blocks.buffers, blocks.simds, blocks.steps, blocks.pad, padded(size, TILE)]
                .map(Constant::Int)
                .to_vec(),
            vec![Constant::Float(self.scale)],
            present.map(Constant::Bool).to_vec(),
        ];
        let launch = blocks.launch(value_size, heads, batch);
        FORWARD.call(&inputs, Plan { constants: constants.concat(), extents: vec![], launch })
    }
}

/// `[H]` or `[H, V]` as `[H · V]`.
fn by_element(skip: &Array, shape: [i32; 2]) -> Result<Array> {
    let skip = if skip.ndim() == 1 { skip.expand_dims(-1)? } else { skip.clone() };
    Ok(broadcast_to(skip, &shape)?.flatten(None, None)?)
}

/// What a group works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Blocks {
    /// Simdgroups, each with 16 rows of a state.
    simds: i32,
    /// Of a chunk.
    steps: i32,
    /// Numbers between the rows in threadgroup memory, so that their columns lie in different banks.
    pad: i32,
    /// Chunks in threadgroup memory: with two, the next arrives while one is worked on.
    buffers: i32,
    bytes: i32,
}

impl Blocks {
    /// What fits, the best first.
    fn fitting([size, value_size]: [i32; 2], dtype: Dtype, target: Target) -> Option<Self> {
        let element = if dtype == Dtype::Float32 { 4 } else { 2 };
        let simds = simds_for(value_size);
        let pad = 16 / element;
        let choices = [(32, pad, 2), (32, pad, 1), (16, pad, 2), (16, pad, 1), (16, 0, 1)];
        let blocks = choices.map(|(steps, pad, buffers)| {
            let row = 2 * (padded(size, TILE) + pad) + TILE * simds + pad;
            let bytes = element * steps * (buffers * row + steps + pad);
            Self { simds, steps, pad, buffers, bytes }
        });
        let limit = Launch::most_threadgroup_bytes(target).cast_signed();
        blocks.into_iter().find(|blocks| blocks.bytes <= limit)
    }

    fn launch(self, value_size: i32, heads: i32, batch: i32) -> Launch {
        let groups = (value_size - 1) / (TILE * self.simds) + 1;
        Launch {
            groups: [groups, heads, batch].map(i32::unsigned_abs),
            group: [32 * self.simds.unsigned_abs(), 1, 1],
            threadgroup_bytes: self.bytes.unsigned_abs(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitting(sizes: [i32; 2], dtype: Dtype, target: Target) -> Option<Blocks> {
        Blocks::fitting(sizes, dtype, target)
    }

    #[test]
    fn threadgroup_memory_suffices_for_all_but_the_largest_keys_of_floats() {
        for size in [1, 16, 64, 100, 128, 192, 256] {
            for value_size in [1, 16, 40, 64, 300] {
                for target in [Target::Metal, Target::Cuda] {
                    let sizes = [size, value_size];
                    assert!(fitting(sizes, Dtype::Bfloat16, target).is_some(), "{sizes:?}");
                    let fits = fitting(sizes, Dtype::Float32, target).is_some();
                    let small = size <= 192 || target == Target::Cuda;
                    assert_eq!(fits, small, "{sizes:?} {target:?}");
                }
            }
        }
    }

    #[test]
    fn two_chunks_of_32_steps_are_in_memory_where_they_fit() {
        let of = |size, dtype| {
            let blocks = fitting([size, 64], dtype, Target::Cuda)?;
            Some([blocks.steps, blocks.buffers])
        };
        assert_eq!(of(128, Dtype::Bfloat16), Some([32, 2]));
        assert_eq!(of(256, Dtype::Bfloat16), Some([32, 1]));
        assert_eq!(of(128, Dtype::Float32), Some([32, 1]));
        assert_eq!(of(256, Dtype::Float32), Some([16, 1]));
    }

    #[test]
    fn groups_cover_every_row_of_a_state() {
        for (value_size, groups, threads) in
            [(1, 1, 32), (17, 1, 64), (64, 1, 128), (65, 2, 128), (300, 5, 128)]
        {
            let launch = fitting([64, value_size], Dtype::Float16, Target::Metal)
                .map(|blocks| blocks.launch(value_size, 6, 2));
            let shape = launch.map(|launch| (launch.groups, launch.group));
            assert_eq!(shape, Some(([groups, 6, 2], [threads, 1, 1])), "{value_size}");
        }
    }
}
