//! What is known of a draw before it is made.

use mlx_rs::{Array, Dtype};

use crate::{
    check::{Check, axes},
    error::Result,
    sampling::TokenMask,
};

/// What may be drawn, and what is proposed. Default: everything, and nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conditions<'a> {
    /// `N` of them, or none at all: the tokens that each row may draw, where not all.
    pub masks: &'a [Option<&'a TokenMask>],
    /// Tokens that the rows get where that leaves their distributions as they are.
    pub proposal: Option<Proposal<'a>>,
}

/// Tokens that somebody drew for the rows of a batch, and by what.
#[derive(Debug, Clone, Copy)]
pub struct Proposal<'a> {
    /// `[N]`, u32. Each must have been drawn by the probabilities beside it, or what comes of it has another distribution than
    /// the row. One that is not below `V` is not kept.
    pub tokens: &'a Array,
    /// `[N, V]`, f32. A row of zeros is one that nothing is proposed to.
    pub probabilities: &'a Array,
}

impl Conditions<'_> {
    /// They fit so many rows and tokens.
    pub(super) fn check(&self, check: Check, [rows, vocabulary]: [i32; 2]) -> Result<()> {
        let (expected, count) = (rows.unsigned_abs() as usize, self.masks.len());
        let fits = count == expected || count == 0;
        check.value(fits, "masks", format_args!("number {expected}"), count)?;
        for mask in self.masks.iter().flatten() {
            let (expected, found) = (format_args!("be of {vocabulary} tokens"), mask.vocabulary());
            check.value(found == vocabulary, "masks", expected, found)?;
        }
        let Some(Proposal { tokens, probabilities }) = self.proposal else { return Ok(()) };
        check.dtype_among("proposal.tokens", tokens, &[Dtype::Uint32])?;
        check.shape("proposal.tokens", tokens, axes![rows])?;
        check.dtype_among("proposal.probabilities", probabilities, &[Dtype::Float32])?;
        check.shape("proposal.probabilities", probabilities, axes![rows, vocabulary])
    }
}
