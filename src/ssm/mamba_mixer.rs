//! Either kind of block.

use mlx_rs::{Array, error::Exception, module::Module};

use super::{Mamba2Block, MambaBlock, MambaInput, MambaState};
use crate::{error::Result, layers::parameters_of_variants};

/// What the blocks of a [`Mamba`](super::Mamba) are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum MambaKind {
    /// [`MambaBlock`]s.
    #[default]
    Mamba,
    /// [`Mamba2Block`]s; [`MambaKind::MAMBA2`] has the numbers of the paper.
    Mamba2 {
        /// See [`Mamba2BlockBuilder::head_dim`](super::Mamba2BlockBuilder::head_dim).
        head_dim: i32,
        /// See [`Mamba2BlockBuilder::n_groups`](super::Mamba2BlockBuilder::n_groups).
        n_groups: i32,
    },
}

impl MambaKind {
    /// [`Mamba2Block`]s with the heads and groups of [`Mamba2Block::new`].
    pub const MAMBA2: Self = Self::Mamba2 {
        head_dim: Mamba2Block::DEFAULT_HEAD_DIM,
        n_groups: Mamba2Block::DEFAULT_N_GROUPS,
    };
}

/// The block of a [`MambaLayer`](super::MambaLayer), under its own parameter names.
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum MambaMixer {
    /// That of Mamba.
    Mamba(MambaBlock),
    /// That of Mamba-2.
    Mamba2(Mamba2Block),
}

parameters_of_variants!(MambaMixer { Mamba, Mamba2 });

impl MambaMixer {
    /// [`MambaBlock::step`] or [`Mamba2Block::step`].
    ///
    /// # Errors
    /// Those of the block.
    pub fn step(&mut self, x: impl AsRef<Array>, state: &mut MambaState) -> Result<Array> {
        match self {
            Self::Mamba(block) => block.step(x, state),
            Self::Mamba2(block) => block.step(x, state),
        }
    }
}

impl From<MambaBlock> for MambaMixer {
    fn from(block: MambaBlock) -> Self {
        Self::Mamba(block)
    }
}

impl From<Mamba2Block> for MambaMixer {
    fn from(block: Mamba2Block) -> Self {
        Self::Mamba2(block)
    }
}

impl<'a, I: Into<MambaInput<'a>>> Module<I> for MambaMixer {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        match self {
            Self::Mamba(block) => block.forward(input),
            Self::Mamba2(block) => block.forward(input),
        }
    }

    fn training_mode(&mut self, mode: bool) {
        match self {
            Self::Mamba(block) => Module::<&Array>::training_mode(block, mode),
            Self::Mamba2(block) => Module::<&Array>::training_mode(block, mode),
        }
    }
}
