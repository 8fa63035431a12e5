//! One pass over the sequence, and one back that computes the states between saved ones anew.

use mlx_rs::{Array, Dtype, ops::zeros};

use super::{
    problem::{Operands, Problem, Rule, Sizes},
    reference,
};
use crate::{
    error::Result,
    kernel::{
        self, Argument, Constant, Kernel, Launch, MAX_ELEMENTS, Plan, Vjp, differentiable, metal,
        stand_in,
    },
    sizes::div_ceil,
    target::Target,
    uploads,
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD, &SUMS];

static FORWARD: Kernel = Kernel {
    name: "selective_scan",
    inputs: &[
        Argument::of("T", "u", &["T", "D"]),
        Argument::of("T", "delta", &["T", "D"]),
        Argument::of("T", "z", &["any z"]),
        Argument::fixed(Dtype::Float32, "a", &["D", "N"]),
        Argument::of("T", "b", &["T", "G", "N"]),
        Argument::of("T", "c", &["T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "skip", &["any skip"]),
        Argument::fixed(Dtype::Float32, "bias", &["any bias"]),
        Argument::fixed(Dtype::Float32, "state", &["any state"]),
        Argument::fixed(Dtype::Int32, "places", &["R", "2"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["T", "D"]),
        Argument::fixed(Dtype::Float32, "last", &["S", "D", "N"]),
        Argument::fixed(Dtype::Float32, "saved", &["P", "D", "N"]),
    ],
    constants: &[
        "LANES", "STATES", "WIDTH", "THREADS", "STEPS", "PERIOD", "GATED", "SKIPS", "BIASED",
        "SOFTPLUS", "STARTED",
    ],
    fragments: &[metal!("common/curve.metal"), metal!("common/selective.metal")],
    file: metal!("scan/selective_scan.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "selective_scan_backward",
    inputs: &[
        Argument::of("T", "u", &["T", "D"]),
        Argument::of("T", "delta", &["T", "D"]),
        Argument::of("T", "z", &["any z"]),
        Argument::fixed(Dtype::Float32, "a", &["D", "N"]),
        Argument::of("T", "b", &["T", "G", "N"]),
        Argument::of("T", "c", &["T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "skip", &["any skip"]),
        Argument::fixed(Dtype::Float32, "bias", &["any bias"]),
        Argument::fixed(Dtype::Int32, "places", &["R", "2"]),
        Argument::fixed(Dtype::Float32, "saved", &["P", "D", "N"]),
        Argument::of("T", "dy", &["T", "D"]),
        Argument::fixed(Dtype::Float32, "dlast", &["S", "D", "N"]),
    ],
    outputs: &[
        Argument::of("T", "du", &["T", "D"]),
        Argument::of("T", "ddelta", &["T", "D"]),
        Argument::of("T", "dz", &["Z"]),
        Argument::fixed(Dtype::Float32, "da", &["S", "D", "N"]),
        Argument::fixed(Dtype::Float32, "db", &["B", "T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "dc", &["B", "T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "dskip", &["S", "D"]),
        Argument::fixed(Dtype::Float32, "dbias", &["S", "D"]),
        Argument::fixed(Dtype::Float32, "dstate", &["S", "D", "N"]),
    ],
    constants: &[
        "LANES", "STATES", "WIDTH", "THREADS", "STEPS", "PERIOD", "GATED", "SKIPS", "BIASED",
        "SOFTPLUS", "COPIES",
    ],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/curve.metal"),
        metal!("common/selective.metal"),
    ],
    file: metal!("scan/selective_scan_backward.metal"),
};

static SUMS: Kernel = Kernel {
    name: "selective_scan_sums",
    inputs: &[
        Argument::fixed(Dtype::Float32, "db_parts", &["B", "T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "dc_parts", &["B", "T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "da_parts", &["S", "D", "N"]),
        Argument::fixed(Dtype::Float32, "dskip_parts", &["S", "D"]),
        Argument::fixed(Dtype::Float32, "dbias_parts", &["S", "D"]),
    ],
    outputs: &[
        Argument::fixed(Dtype::Float32, "db", &["T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "dc", &["T", "G", "N"]),
        Argument::fixed(Dtype::Float32, "da", &["D", "N"]),
        Argument::fixed(Dtype::Float32, "dskip", &["D"]),
        Argument::fixed(Dtype::Float32, "dbias", &["D"]),
    ],
    constants: &[],
    fragments: &[],
    file: metal!("scan/selective_scan_sums.metal"),
};

/// The most states of a channel.
const MAX_STATES: i32 = 256;

/// Why the kernel cannot take this problem, if it cannot.
pub(super) fn refusal(problem: &Problem) -> Option<&'static str> {
    let Operands { u, b, .. } = &problem.operands;
    let Sizes { states, sequences, .. } = problem.sizes;
    if states > MAX_STATES {
        return Some("the kernel takes 256 states at most");
    }
    if sequences.unsigned_abs() > Launch::MAX_GROUPS_ASIDE {
        return Some("the kernel takes no more than 65535 sequences");
    }
    let state = problem.sizes.channels as usize * states as usize;
    let blocks = Geometry::backward(problem.sizes).blocks as usize;
    let most = [sequences as usize * state, most_saved(problem.sizes) * state, blocks * b.size()];
    if most.into_iter().any(|size| size > MAX_ELEMENTS) {
        return Some("the kernel writes no more than 2^31 elements");
    }
    kernel::refusal([u, b])
}

/// Not fewer than are saved.
fn most_saved(sizes: Sizes) -> usize {
    let Sizes { batch, length, sequences, .. } = sizes;
    batch as usize * (length / Geometry::PERIOD) as usize + sequences as usize + 1
}

/// How channels, states and steps are shared out, forward or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    sizes: Sizes,
    /// Lanes of a channel.
    lanes: i32,
    /// States of a lane.
    states: i32,
    /// Of a group.
    threads: i32,
    /// Steps that go through threadgroup memory at once.
    steps: i32,
    /// Groups of threads for the channels of one group.
    blocks: i32,
}

impl Geometry {
    /// Channels of a thread.
    const WIDTH: i32 = 1;
    /// Steps from one saved state to the next: what is saved of 16 states takes 4 bytes a step and channel. With twice as
    /// many, the gradient takes a sixth longer on an H200.
    const PERIOD: i32 = 16;
    /// Where nobody will ask for a gradient: no more than the one state that each sequence begins with.
    const NO_PERIOD: i32 = i32::MAX;
    /// Fewer groups than these leave an H200 waiting, forward: 2048 channels of 16 states take a twentieth less with twice as
    /// many lanes for four sequences, which are 256 groups, and a fifth less for one. With 512 groups, of 16 or of 32
    /// states, twice the lanes add an eighth and a fifth.
    const FEW_FORWARD: i64 = 400;
    /// The same back: with 64 groups, twice the lanes take an eighth off, with 128 they add a tenth, with 192 they change
    /// little, and with 256 they add two fifths.
    const FEW_BACKWARD: i64 = 100;

    fn period() -> i32 {
        if kernel::is_inference() { Self::NO_PERIOD } else { Self::PERIOD }
    }

    fn forward(sizes: Sizes) -> Self {
        let steps = if sizes.states <= 128 { 16 } else { 8 };
        Self::new(sizes, Self::shares(sizes.states), steps)
            .with_more_lanes_below(Self::FEW_FORWARD, 64)
    }

    /// As many steps as fit: a lane holds two numbers for each of its states and steps in registers, and a group two for
    /// each state, step and simdgroup in its memory. More lanes of more than 16 states were not measured, and the sums of each
    /// block of channels would take more memory than all else.
    fn backward(sizes: Sizes) -> Self {
        let steps = match sizes.states {
            ..=32 => 16,
            33..=64 => 8,
            _ => 4,
        };
        Self::new(sizes, Self::shares(sizes.states), steps)
            .with_more_lanes_below(Self::FEW_BACKWARD, 16)
    }

    /// Lanes of a channel, states of a lane and threads of a group: four states a lane as far as lanes go, which share what a
    /// step costs beside them.
    fn shares(states: i32) -> [i32; 3] {
        match states {
            ..=16 => [4, 4, 128],
            17..=32 => [8, 4, 128],
            33..=64 => [16, 4, 128],
            65..=128 => [32, 4, 128],
            _ => [32, 8, 64],
        }
    }

    /// With two states a lane where groups are few: a step waits for the one before it, and more warps hide that.
    fn with_more_lanes_below(self, few: i64, most_states: i32) -> Self {
        let Self { sizes, lanes, states, threads, steps, blocks } = self;
        let groups = i64::from(blocks * sizes.groups) * i64::from(sizes.sequences);
        match groups < few && sizes.states <= most_states {
            true => Self::new(sizes, [2 * lanes, states / 2, threads], steps),
            false => self,
        }
    }

    fn new(sizes: Sizes, [lanes, states, threads]: [i32; 3], steps: i32) -> Self {
        // A few steps fill no tile of many.
        let steps = if sizes.length <= 4 { 4 } else { steps };
        let of_block = threads / lanes * Self::WIDTH;
        let blocks = div_ceil(sizes.channels / sizes.groups, of_block);
        Self { sizes, lanes, states, threads, steps, blocks }
    }

    fn constants(&self, rule: &Rule, period: i32) -> Vec<Constant> {
        let Self { lanes, states, threads, steps, .. } = *self;
        let sizes = [lanes, states, Self::WIDTH, threads, steps, period];
        let flags = [rule.gated, rule.skips, rule.biased, rule.softplus];
        sizes.map(Constant::Int).into_iter().chain(flags.map(Constant::Bool)).collect()
    }

    fn launch(&self, threadgroup_bytes: i32) -> Launch {
        let groups = self.blocks * self.sizes.groups;
        Launch {
            groups: [groups.unsigned_abs(), self.sizes.sequences.unsigned_abs(), 1],
            group: [self.threads.unsigned_abs(), 1, 1],
            threadgroup_bytes: threadgroup_bytes.unsigned_abs(),
        }
    }

    fn forward_plan(&self, rule: &Rule, period: i32, saved: i32) -> Plan {
        let channels = self.channels_of_block();
        let of_step = 2 * channels + in_fours(channels) + 2 * self.lanes * self.states;
        let bytes = 4 * self.steps * of_step;
        let extents = vec![("S", self.sizes.sequences), ("P", saved)];
        let mut constants = self.constants(rule, period);
        constants.push(Constant::Bool(rule.started));
        Plan { constants, extents, launch: self.launch(bytes) }
    }

    fn backward_plan(&self, rule: &Rule, gates: i32) -> Plan {
        let channels = self.channels_of_block();
        let of_channels = 2 * channels + in_fours(channels) + 3 * self.pitch_of_sums();
        let of_states = 2 * self.lanes * self.states * (self.copies() + self.threads / 32);
        let kept = ((Self::PERIOD / self.steps - 1) * Self::WIDTH * self.states).max(2);
        let bytes = 4 * (self.steps * (of_channels + of_states) + self.threads * kept);
        let extents = vec![("B", self.blocks), ("Z", gates)];
        let mut constants = self.constants(rule, Self::PERIOD);
        constants.push(Constant::Int(self.copies()));
        Plan { constants, extents, launch: self.launch(bytes) }
    }

    /// Of `b` and `c` in a group's memory, for the gradient. Four take 3 to 6 % off 16 states of four lanes on an H200;
    /// with eight lanes, where fewer channels share a simdgroup, there was no gain, and for 32 states there is no room.
    fn copies(&self) -> i32 {
        if self.lanes == 4 { 4 } else { 1 }
    }

    /// From one row of sums of a block's channels to the next, so that four rows of a simdgroup's lie in different banks.
    fn pitch_of_sums(&self) -> i32 {
        in_fours(self.channels_of_block() + 32 / self.lanes)
    }

    fn channels_of_block(&self) -> i32 {
        self.threads / self.lanes * Self::WIDTH
    }
}

/// So many numbers, and as many more as fill the last four.
fn in_fours(count: i32) -> i32 {
    (count + 3) / 4 * 4
}

/// The first step of each sequence and the row of its first saved state, and the ends of both: `[S + 1, 2]`.
fn places(sizes: Sizes, rule: &Rule, period: i32) -> Vec<[i32; 2]> {
    let starts: Vec<_> = match &rule.segments {
        Some(segments) => segments.clone(),
        None => (0..=sizes.batch).map(|row| row * sizes.length).collect(),
    };
    let mut saved = 0;
    let mut places = vec![[0, 0]];
    for pair in starts.windows(2) {
        let steps = pair[1] - pair[0];
        saved += steps / period + i32::from(steps % period > 0);
        places.push([pair[1], saved]);
    }
    places
}

/// `[B, L, D]` of the dtype of `u`, and the final states, f32.
pub(super) fn scan(problem: &Problem) -> Result<[Array; 2]> {
    let (sizes, rule) = (problem.sizes, problem.rule.clone());
    let period = Geometry::period();
    let places = places(sizes, &rule, period);
    let (rule_back, places_back, rule_of_reference) = (rule.clone(), places.clone(), rule.clone());
    let saved = places.last().map_or(0, |last| last[1]);
    let [y, state, _] = differentiable(
        problem.operands.in_order(),
        move |arrays| forward(&Operands::of(arrays), sizes, &rule, period, &places),
        move |vjp| backward(vjp, sizes, &rule_back, &places_back),
        move |arrays| {
            let [y, state] = reference::scan(&Operands::of(arrays), &rule_of_reference)?;
            // Nobody reads what the gradient's kernel alone needs.
            Ok([y, state, zeros::<f32>(&[saved, sizes.channels, sizes.states])?])
        },
    )?;
    Ok([y, state])
}

/// The operands as kernels take them.
struct Flat([Array; 10]);

impl Flat {
    fn new(operands: &Operands<&Array>, sizes: Sizes, places: &[[i32; 2]]) -> Result<Self> {
        let Sizes { batch, length, channels, groups, states, .. } = sizes;
        let by_channel = [batch * length, channels];
        let by_state = [batch * length, groups, states];
        let float = |array: &Array| array.as_dtype(Dtype::Float32);
        let count = i32::try_from(places.len()).unwrap_or(i32::MAX);
        let z = operands.z.reshape(&[-1])?;
        Ok(Self([
            operands.u.reshape(&by_channel)?,
            operands.delta.reshape(&by_channel)?,
            z.as_dtype(operands.u.dtype())?,
            float(operands.a)?,
            operands.b.reshape(&by_state)?,
            operands.c.reshape(&by_state)?,
            float(operands.d)?,
            float(operands.bias)?,
            operands.state.reshape(&[-1])?,
            uploads::integers(places.as_flattened().to_vec()).reshape(&[count, 2])?,
        ]))
    }
}

fn forward(
    operands: &Operands<&Array>,
    sizes: Sizes,
    rule: &Rule,
    period: i32,
    places: &[[i32; 2]],
) -> Result<[Array; 3]> {
    let Flat(arrays) = Flat::new(operands, sizes, places)?;
    let saved = places.last().map_or(0, |last| last[1]);
    let plan = Geometry::forward(sizes).forward_plan(rule, period, saved);
    let [y, last, saved] = FORWARD.call(&arrays.each_ref(), plan)?;
    Ok([y.reshape(operands.u.shape())?, last, saved])
}

fn backward(
    vjp: Vjp<'_, 9, 3>,
    sizes: Sizes,
    rule: &Rule,
    places: &[[i32; 2]],
) -> Result<[Array; 9]> {
    let operands = Operands::of(vjp.inputs);
    let Flat([u, delta, z, a, b, c, skip, bias, _, places]) = Flat::new(&operands, sizes, places)?;
    let ([_, _, saved], [dy, dlast, _]) = (vjp.outputs, vjp.cotangents);
    let dy = dy.reshape(u.shape())?;
    let inputs = [&u, &delta, &z, &a, &b, &c, &skip, &bias, &places, saved, &dy, dlast];
    let plan = Geometry::backward(sizes).backward_plan(rule, z.dim(0));
    let [du, ddelta, dz, da, db, dc, dskip, dbias, dstate] = BACKWARD.call(&inputs, plan)?;
    let like = |sum: Array, like: &Array| -> Result<Array> {
        Ok(sum.reshape(like.shape())?.as_dtype(like.dtype())?)
    };
    let none = || stand_in(Dtype::Float32, 1);
    let [db, dc, da, dskip, dbias] = sums([db, dc, da, dskip, dbias])?;
    Ok([
        du.reshape(operands.u.shape())?,
        ddelta.reshape(operands.u.shape())?,
        if rule.gated { dz.reshape(operands.u.shape())? } else { none() },
        like(da, operands.a)?,
        like(db, operands.b)?,
        like(dc, operands.c)?,
        if rule.skips { like(dskip, operands.d)? } else { none() },
        if rule.biased { like(dbias, operands.bias)? } else { none() },
        if rule.started { dstate } else { none() },
    ])
}

/// Of `db`, `dc`, `da`, `dskip` and `dbias`, each in parts along its first axis.
fn sums(parts: [Array; 5]) -> Result<[Array; 5]> {
    let [db, _, da, dskip, _] = &parts;
    // MLX's sums were seen to be slow on NVIDIA's GPUs alone, and of one block of channels there is little to sum.
    if db.dim(0) == 1 || Target::current()? == Target::Metal {
        let [db, dc, da, dskip, dbias] = parts.map(|parts| parts.sum_axis(0, false));
        return Ok([db?, dc?, da?, dskip?, dbias?]);
    }
    let of_part = |parts: &Array| {
        parts.shape().iter().skip(1).map(|size| size.unsigned_abs()).product::<u32>()
    };
    let plan = sums_plan(of_part(db), of_part(da) + 2 * of_part(dskip));
    SUMS.call(&parts.each_ref(), plan)
}

/// For so many elements of `db`, as many of `dc`, and so many of all else.
fn sums_plan(of_states: u32, others: u32) -> Plan {
    const THREADS: u32 = 256;
    let launch = Launch {
        groups: [of_states.max(others).div_ceil(THREADS), 3, 1],
        group: [THREADS, 1, 1],
        threadgroup_bytes: 0,
    };
    Plan { constants: Vec::new(), extents: Vec::new(), launch }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(length: i32, channels: i32, states: i32) -> Sizes {
        Sizes { batch: 2, length, channels, groups: 1, states, sequences: 2 }
    }

    const EVERY: Rule = Rule {
        gated: true,
        skips: true,
        biased: true,
        softplus: true,
        started: true,
        segments: None,
    };

    #[test]
    fn every_channel_and_state_has_a_lane_and_every_gpu_can_run_it() {
        for length in [1, 4, 5, 100_000] {
            for channels in [1, 31, 32, 33, 4096] {
                for states in [1, 16, 17, 32, 33, 64, 65, 128, 129, 256] {
                    let sizes = sizes(length, channels, states);
                    let (forward, backward) = (Geometry::forward(sizes), Geometry::backward(sizes));
                    assert_covers(&forward, &forward.forward_plan(&EVERY, Geometry::PERIOD, 7));
                    assert_covers(&backward, &backward.backward_plan(&EVERY, 1));
                }
            }
        }
    }

    fn assert_covers(geometry: &Geometry, plan: &Plan) {
        let Geometry { sizes, lanes, states, threads, steps, blocks } = *geometry;
        assert!(lanes * states >= sizes.states, "{geometry:?}");
        assert!(blocks * threads / lanes >= sizes.channels, "{geometry:?}");
        // A period is a whole number of tiles, and a tile of fours.
        assert!(Geometry::PERIOD % steps == 0 && steps % 4 == 0, "{geometry:?}");
        assert!(plan.launch.check("selective_scan", Target::Metal).is_ok(), "{plan:?}");
        // The kernels share out channels by twos and fours, and keep the last sums of 32.
        let channels = geometry.channels_of_block();
        assert!(channels % 2 == 0 && channels <= 32, "{geometry:?}");
    }

    #[test]
    fn every_sum_of_parts_has_a_thread() {
        for (of_states, others) in [(1, 1), (256, 257), (257, 256), (1 << 30, 1)] {
            let Plan { launch, .. } = sums_plan(of_states, others);
            let [across, kinds, _] = launch.groups;
            assert!(across * launch.group[0] >= of_states.max(others) && kinds == 3, "{launch:?}");
            assert!(launch.check("selective_scan_sums", Target::Cuda).is_ok(), "{launch:?}");
        }
    }

    #[test]
    fn there_are_more_lanes_where_groups_are_few() {
        let lanes = |geometry: fn(Sizes) -> Geometry, sequences, channels, states| {
            geometry(Sizes { sequences, ..sizes(64, channels, states) }).lanes
        };
        for (sequences, channels, states, forward, backward) in [
            (1, 2048, 16, 8, 8),
            (2, 2048, 16, 8, 4),
            (4, 2048, 16, 8, 4),
            (99, 32, 16, 8, 8),
            (100, 32, 16, 8, 4),
            (399, 32, 16, 8, 4),
            (400, 32, 16, 4, 4),
            (200, 33, 16, 4, 4),
            (1, 2048, 32, 16, 8),
            (4, 2048, 32, 8, 8),
            (1, 2048, 64, 32, 16),
            (4, 2048, 64, 16, 16),
            (1, 2048, 128, 32, 32),
        ] {
            let what = format!("{sequences} of {channels} channels, {states} states");
            assert_eq!(lanes(Geometry::forward, sequences, channels, states), forward, "{what}");
            assert_eq!(lanes(Geometry::backward, sequences, channels, states), backward, "{what}");
        }
    }

    #[test]
    fn a_gradient_is_prepared_for_unless_none_may_follow() {
        assert_eq!(kernel::inference(Geometry::period), Geometry::NO_PERIOD);
        assert_eq!(Geometry::period(), Geometry::PERIOD);
    }

    #[test]
    fn states_are_saved_for_each_period_that_begins() {
        let of_rows = places(sizes(65, 1, 1), &EVERY, Geometry::PERIOD);
        assert_eq!(of_rows, [[0, 0], [65, 5], [130, 10]]);
        let rule = Rule { segments: Some(vec![0, 0, 32, 65]), ..EVERY };
        let of_segments = |period| places(sizes(65, 1, 1), &rule, period);
        assert_eq!(of_segments(Geometry::PERIOD), [[0, 0], [0, 0], [32, 2], [65, 5]]);
        assert_eq!(of_segments(Geometry::NO_PERIOD), [[0, 0], [0, 0], [32, 1], [65, 2]]);
    }
}
