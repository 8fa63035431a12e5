//! What MLX's C interface offers and mlx-rs does not expose, behind safe functions.
pub(crate) mod stream;
