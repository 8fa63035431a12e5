//! One pass over both, by a kernel of this crate; backwards it is the gradient.

use mlx_rs::{Array, Dtype, ops::zeros_like};

use crate::{
    error::Result,
    kernel::{Argument, Constant, Kernel, Plan, differentiable, metal},
    rope::{
        RopeOffset,
        heads::{Geometry, by_token},
        pair::Pair,
        turning::Turning,
    },
};

/// The kernels of this operation.
pub(crate) const KERNELS: &[&Kernel] = &[&KERNEL];

static KERNEL: Kernel = Kernel {
    name: "rope_qk",
    inputs: &[
        Argument::of("T", "queries", &["O", "H", "I", "D"]),
        Argument::of("T", "keys", &["O", "K", "I", "D"]),
        Argument::fixed(Dtype::Int32, "starts", &["B"]),
        Argument::fixed(Dtype::Uint64, "turns", &["P"]),
    ],
    outputs: &[
        Argument::of("T", "queries_turned", &["O", "H", "I", "D"]),
        Argument::of("T", "keys_turned", &["O", "K", "I", "D"]),
    ],
    constants: &["HEADS", "LANES", "DIMS", "INTERLEAVED", "MAGNITUDE"],
    fragments: &[metal!("common/chunk.metal"), metal!("common/heads.metal")],
    file: metal!("rope/rope_qk.metal"),
};

pub(super) fn rope_qk(pair: &Pair) -> Result<[Array; 2]> {
    let starts = pair.starts();
    let (forward, backward) = (pair.turning.clone(), pair.turning.backwards());
    let reference = pair.turning.clone();
    differentiable(
        [pair.queries, pair.keys, &starts],
        move |inputs| turn(inputs, &forward),
        move |vjp| {
            let ([queries, keys], [_, _, starts]) = (vjp.cotangents, vjp.inputs);
            let [queries, keys] =
                turn(&[queries.clone(), keys.clone(), starts.clone()], &backward)?;
            Ok([queries, keys, zeros_like(starts)?])
        },
        move |[queries, keys, starts]| {
            let offset = RopeOffset::PerRow(starts);
            Ok([reference.reference(queries, offset)?, reference.reference(keys, offset)?])
        },
    )
}

fn turn([queries, keys, starts]: &[Array; 3], turning: &Turning) -> Result<[Array; 2]> {
    let views = [by_token(queries, turning.layout)?, by_token(keys, turning.layout)?];
    let turns = turning.frequencies.turns();
    let [turned, turned_keys] =
        KERNEL.call(&[&views[0], &views[1], starts, &turns], plan(&views, turning))?;
    Ok([turned.reshape(queries.shape())?, turned_keys.reshape(keys.shape())?])
}

fn plan([queries, keys]: &[Array; 2], turning: &Turning) -> Plan {
    let geometry = Geometry::apart(turning.dims, queries.dim(3), queries.dtype());
    let shares = [geometry.heads, geometry.lanes].map(Constant::Int);
    let constants = [&shares[..], &turning.constants()].concat();
    let groups = geometry.groups(queries) + geometry.groups(keys);
    Plan { constants, extents: Vec::new(), launch: Geometry::launch(groups, 0) }
}
