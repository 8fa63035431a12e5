//! States that fade and grow by outer products, in chunks: `S ← decay · S + k vᵀ`, read by `q`.
//!
//! Within a chunk a query meets earlier keys directly, as attention without a softmax does; what came before the chunk is a
//! state that an affine scan carries from chunk to chunk. All of it is products of matrices. Decays are kept as
//! logarithms, and only differences of their sums from a later to an earlier step are ever exponents, so that nothing
//! overflows where no decay is above 1. Heads stand before chunks, so that the scan has one decay for all of a state.

mod decay;
pub(super) mod kernel;
mod layout;
mod passes;
mod places;

pub(super) use decay::{Fade, NOTHING_LEFT};
pub(super) use layout::Layout;
pub(super) use passes::Pass;
pub(super) use places::Places;

use mlx_rs::{Array, Dtype};

use super::associative::{ScanOptions, affine_scan_with_state};
use crate::{
    dispatch::{Context, Target},
    error::Result,
};

/// The dtype in which to multiply matrices whose results are wanted in `dtype`: MLX's CPU back end multiplies half
/// precision without BLAS.
pub(super) fn operand(dtype: Dtype) -> Result<Dtype> {
    Ok(match Context::current()?.target {
        Target::Cpu => Dtype::Float32,
        Target::Metal | Target::Cuda => dtype,
    })
}

/// Sequences cut into chunks by a [`Layout`].
pub(super) struct Chunks {
    /// `[B, G, 1, n, Q, K]`
    pub(super) queries: Array,
    /// `[B, G, 1, n, Q, K]`
    pub(super) keys: Array,
    /// `[B, G, R, n, Q, V]`
    pub(super) values: Array,
    pub(super) fade: Fade,
}

impl Chunks {
    /// What queries read, `[B, G, R, n, Q, V]` in `dtype`, and the states after the last chunk, `[B, G, R, K, V]`, or after each
    /// segment, `[B, N, G, R, K, V]`. `state` is the one before the first chunk.
    pub(super) fn run(&self, state: &Array, dtype: Dtype) -> Result<[Array; 2]> {
        let mut added = self.fade.gathered(&self.keys, &self.values)?;
        if self.fade.places.is_some() {
            // Of states before chunks come those that are told.
            added = added.as_dtype(Dtype::Float32)?;
        }
        let options = ScanOptions {
            axis: 3,
            exclusive: true,
            initial_state: Some(state),
            ..Default::default()
        };
        let (carried, last) = affine_scan_with_state(self.fade.through()?, added, options)?;
        let near = self.fade.scores(&self.queries, &self.keys)?;
        let near = near.matmul(&self.values)?;
        let read = self.fade.read_beside(&near, &self.queries, &carried, dtype)?;
        let last = match &self.fade.places {
            Some(places) => places.states(&self.fade, [&self.keys, &self.values, &carried])?,
            None => last,
        };
        Ok([read, last])
    }
}
