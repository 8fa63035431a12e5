//! The implementations an operation may have.

use std::fmt;

/// One way to compute an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// MLX's own fast op, or a composition built on it.
    Builtin,
    /// A kernel of this crate.
    Kernel,
    /// Plain MLX ops: obvious, right on every device, differentiable.
    Reference,
}

impl Backend {
    /// Every backend.
    pub const ALL: &'static [Self] = &[Self::Builtin, Self::Kernel, Self::Reference];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Builtin => "builtin",
            Self::Kernel => "kernel",
            Self::Reference => "reference",
        })
    }
}
