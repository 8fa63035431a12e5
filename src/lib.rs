//! Building blocks for mlx-rs models.
