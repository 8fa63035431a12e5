//! State-space models: layers whose memory of a sequence is a state of fixed size.

mod diagonal;
mod h3;
mod mamba;
mod mamba_block;
mod s4;

pub use diagonal::{DiagonalSsm, DiagonalState};
pub use h3::{H3, H3Builder, H3Input, H3State};
pub use mamba::{Mamba, MambaBackbone, MambaBuilder, MambaLayer};
pub use mamba_block::{MambaBlock, MambaBlockBuilder, MambaInput, MambaState};
pub use s4::{S4, S4Builder, S4Input};
