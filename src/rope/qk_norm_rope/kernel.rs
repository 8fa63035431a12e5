//! One pass forward and one back, by kernels of this crate.

use mlx_rs::{Array, Dtype, ops::zeros_like};

use super::{Problem, Scaling, reference};
use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Plan, Vjp, differentiable, metal},
    rope::{
        RopeOffset,
        heads::{Geometry, by_token},
        turning::Turning,
    },
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&FORWARD, &BACKWARD];

const QUERIES: &[&str] = &["O", "H", "I", "D"];
const KEYS: &[&str] = &["O", "K", "I", "D"];

static FORWARD: Kernel = Kernel {
    name: "qk_norm_rope",
    inputs: &[
        Argument::of("T", "queries", QUERIES),
        Argument::of("T", "keys", KEYS),
        Argument::of("V", "query_weight", &["D"]),
        Argument::of("W", "key_weight", &["D"]),
        Argument::fixed(Dtype::Int32, "starts", &["B"]),
        Argument::fixed(Dtype::Uint64, "turns", &["P"]),
    ],
    outputs: &[
        Argument::of("T", "queries_turned", QUERIES),
        Argument::of("T", "keys_turned", KEYS),
    ],
    constants: &[
        "HEADS",
        "LANES",
        "ROUNDS",
        "DIMS",
        "INTERLEAVED",
        "MAGNITUDE",
        "EPS",
        "UNIT_OFFSET",
    ],
    fragments: &[
        metal!("common/chunk.metal"),
        metal!("common/heads.metal"),
        metal!("common/head_norm.metal"),
    ],
    file: metal!("rope/qk_norm_rope.metal"),
};

static BACKWARD: Kernel = Kernel {
    name: "qk_norm_rope_backward",
    inputs: &[
        Argument::of("T", "queries", QUERIES),
        Argument::of("T", "keys", KEYS),
        Argument::of("V", "query_weight", &["D"]),
        Argument::of("W", "key_weight", &["D"]),
        Argument::fixed(Dtype::Int32, "starts", &["B"]),
        Argument::fixed(Dtype::Uint64, "turns", &["P"]),
        Argument::of("T", "dqueries_turned", QUERIES),
        Argument::of("T", "dkeys_turned", KEYS),
    ],
    outputs: &[
        Argument::of("T", "dqueries", QUERIES),
        Argument::of("T", "dkeys", KEYS),
        Argument::fixed(Dtype::Float32, "dquery_weight", &["Q", "D"]),
        Argument::fixed(Dtype::Float32, "dkey_weight", &["R", "D"]),
    ],
    constants: &[
        "HEADS",
        "LANES",
        "ROUNDS",
        "DIMS",
        "INTERLEAVED",
        "MAGNITUDE",
        "EPS",
        "UNIT_OFFSET",
        "SIZE",
        "QUERY_GROUPS",
    ],
    file: metal!("rope/qk_norm_rope_backward.metal"),
    ..FORWARD
};

/// The largest head for which the threadgroup memory of the backward kernel suffices.
const MAX_SIZE: i32 = 1024;

/// Groups that the backward kernel works with at most: some for each of a large GPU's cores, and few enough that adding
/// up their weight gradients costs little.
const GROUPS: i32 = 1056;

pub(super) fn refusal(size: i32) -> Option<&'static str> {
    (size > MAX_SIZE).then_some("the kernel takes heads of at most 1024 elements")
}

/// What both kernels know besides their arrays.
#[derive(Debug, Clone)]
struct Work {
    turning: Turning,
    scaling: Scaling,
}

pub(super) fn qk_norm_rope(problem: &Problem) -> Result<[Array; 2]> {
    let Problem { pair, weights, scaling } = problem;
    let starts = pair.starts();
    let forward = Work { turning: pair.turning.clone(), scaling: *scaling };
    let backward = Work { turning: pair.turning.backwards(), scaling: *scaling };
    let plain = forward.clone();
    differentiable(
        [pair.queries, pair.keys, weights[0], weights[1], &starts],
        move |inputs| forward.run(inputs),
        move |vjp| backward.run_backward(vjp),
        move |inputs| plain.reference(inputs),
    )
}

impl Work {
    fn run(&self, inputs: &[Array; 5]) -> Result<[Array; 2]> {
        let [queries, keys, query_weight, key_weight, starts] = inputs;
        let views = [self.view(queries)?, self.view(keys)?];
        let turns = self.turning.frequencies.turns();
        let [normed, normed_keys] = FORWARD.call(
            &[&views[0], &views[1], query_weight, key_weight, starts, &turns],
            self.plan(&views),
        )?;
        Ok([normed.reshape(queries.shape())?, normed_keys.reshape(keys.shape())?])
    }

    fn run_backward(&self, vjp: Vjp<'_, 5, 2>) -> Result<[Array; 5]> {
        let [queries, keys, query_weight, key_weight, starts] = vjp.inputs;
        let views = [self.view(queries)?, self.view(keys)?];
        let [dy, dy_keys] = [self.view(&vjp.cotangents[0])?, self.view(&vjp.cotangents[1])?];
        let turns = self.turning.frequencies.turns();
        let [dx, dx_keys, dweight, dkey_weight] = BACKWARD.call(
            &[&views[0], &views[1], query_weight, key_weight, starts, &turns, &dy, &dy_keys],
            self.plan_backward(&views),
        )?;
        Ok([
            dx.reshape(queries.shape())?,
            dx_keys.reshape(keys.shape())?,
            dweight.sum_axis(0, false)?.as_dtype(query_weight.dtype())?,
            dkey_weight.sum_axis(0, false)?.as_dtype(key_weight.dtype())?,
            zeros_like(starts)?,
        ])
    }

    fn reference(&self, inputs: &[Array; 5]) -> Result<[Array; 2]> {
        let [queries, keys, query_weight, key_weight, starts] = inputs;
        let normed = |x, weight| {
            reference(x, weight, self.scaling, RopeOffset::PerRow(starts), &self.turning)
        };
        Ok([normed(queries, query_weight)?, normed(keys, key_weight)?])
    }

    fn view(&self, x: &Array) -> Result<Array> {
        Ok(by_token(x, self.turning.layout)?)
    }

    fn plan(&self, [queries, keys]: &[Array; 2]) -> Plan {
        let geometry = self.geometry(queries);
        let groups = geometry.groups(queries) + geometry.groups(keys);
        let launch = Geometry::launch(groups, 0);
        Plan { constants: self.constants(geometry), extents: Vec::new(), launch }
    }

    fn plan_backward(&self, [queries, keys]: &[Array; 2]) -> Plan {
        let (geometry, size) = (self.geometry(queries), queries.dim(3));
        let [query_groups, key_groups] = shares(
            [geometry.groups(queries), geometry.groups(keys)],
            [queries.dim(1), keys.dim(1)],
        );
        let mut constants = self.constants(geometry);
        constants.extend([Constant::Int(size), Constant::Int(query_groups)]);
        let bytes = Geometry::SIMDS * size * 4;
        Plan {
            constants,
            extents: vec![("Q", query_groups), ("R", key_groups)],
            launch: Geometry::launch(query_groups + key_groups, bytes),
        }
    }

    fn geometry(&self, queries: &Array) -> Geometry {
        Geometry::together(self.turning.dims, queries.dim(3), queries.dtype())
    }

    fn constants(&self, geometry: Geometry) -> Vec<Constant> {
        let shares = [geometry.heads, geometry.lanes, geometry.rounds].map(Constant::Int);
        let scaling = [Constant::Float(self.scaling.eps), Constant::Bool(self.scaling.unit_offset)];
        [&shares[..], &self.turning.constants(), &scaling].concat()
    }
}

/// Parts of [`GROUPS`] in proportion to the heads of each. Where there is less to do, each group still does two
/// groups' work: rounded up to a power of two, because the kernel is compiled for the first number.
fn shares(needed: [i32; 2], heads: [i32; 2]) -> [i32; 2] {
    let queries = i64::from(GROUPS) * i64::from(heads[0]) / i64::from(heads[0] + heads[1]);
    let queries = (queries as i32).clamp(1, GROUPS - 1);
    let most = [queries, GROUPS - queries];
    std::array::from_fn(|which| {
        let pairs = needed[which].unsigned_abs().div_ceil(2);
        pairs.next_power_of_two().cast_signed().min(most[which])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_shared_by_heads() {
        assert_eq!(shares([100_000, 100_000], [32, 32]), [528, 528]);
        assert_eq!(shares([100_000, 25_000], [32, 8]), [844, 212]);
        assert_eq!(shares([100_000, 100], [i32::MAX / 2, 1]), [1055, 1]);
    }

    #[test]
    fn each_group_has_more_than_one_groups_work() {
        assert_eq!(shares([1, 2], [32, 8]), [1, 1]);
        assert_eq!(shares([5, 3], [32, 8]), [4, 2]);
    }
}
