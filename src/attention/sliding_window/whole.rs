//! Attention to everything, with all but the window hidden: the definition, and the kernel, which skips what is hidden.

use mlx_rs::Array;

use super::Problem;
use crate::{
    attention::flash::{FlashAttentionOptions, Window, flash_attention},
    dispatch::{Backend, Dispatch},
    error::Result,
};

/// In the layout of the call.
pub(super) fn attend(problem: &Problem, backend: Backend) -> Result<Array> {
    let &Problem { window_size, causal, scale, layout, .. } = problem;
    let options = FlashAttentionOptions {
        scale: Some(scale),
        causal,
        window: Window { left: Some(window_size), right: Some(window_size) },
        layout,
        dispatch: Dispatch::Only(backend),
        ..Default::default()
    };
    flash_attention(problem.queries, problem.keys, problem.values, options)
}
