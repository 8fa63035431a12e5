//! State-space models: layers whose memory of a sequence is a state of fixed size.
//!
//! | module | what it is |
//! |---|---|
//! | [`MambaBlock`], [`Mamba2Block`] | the blocks of Mamba and Mamba-2, under the parameter names of `mamba_ssm` |
//! | [`Mamba`] | a language model of either |
//! | [`S4`], [`H3`] | time-invariant models, trained as a convolution and decoded as a recurrence |
//!
//! Each is trained over a whole sequence at once, and decodes by `step` at a constant cost a token.

mod diagonal;
mod h3;
mod mamba;
mod mamba2_block;
mod mamba_block;
mod mamba_mixer;
mod mamba_state;
mod s4;
mod state;
mod step_range;

pub use diagonal::{DiagonalSsm, DiagonalState};
pub use h3::{H3, H3Builder, H3Input, H3State};
pub use mamba::{Mamba, MambaBackbone, MambaBuilder, MambaLayer};
pub use mamba_block::{MambaBlock, MambaBlockBuilder};
pub use mamba_mixer::{MambaKind, MambaMixer};
pub use mamba_state::{MambaInput, MambaState};
pub use mamba2_block::{Mamba2Block, Mamba2BlockBuilder};
pub use s4::{S4, S4Builder, S4Input};
pub use state::RecurrentState;
