//! State-space models: layers whose memory of a sequence is a state of fixed size.

mod mamba;
mod mamba_block;

pub use mamba::{Mamba, MambaBackbone, MambaBuilder, MambaLayer};
pub use mamba_block::{MambaBlock, MambaBlockBuilder, MambaInput, MambaState};
