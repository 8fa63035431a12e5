//! Steps that change logits, whatever their probabilities.

use std::collections::HashSet;

use mlx_rs::{
    Array,
    ops::{
        broadcast_to,
        indexing::{scatter_add_single, scatter_single},
        select, zeros_dtype,
    },
};

use crate::{
    error::Result,
    sampling::{SamplingParams, history::Counts},
    uploads,
};

/// The penalties of all rows, `[N, 1]` each.
#[derive(Debug, Clone)]
pub(in crate::sampling) struct Penalties {
    pub(in crate::sampling) repetition: Array,
    pub(in crate::sampling) frequency: Array,
    pub(in crate::sampling) presence: Array,
}

/// Takes repetition, frequency and presence penalties off scores, in this order. The first of these divides what is above 0 and
/// multiplies what is not, so it has to know how far scores are `below` what they stand for, `[N, 1]`, if they are.
pub(in crate::sampling) fn penalize(
    scores: &Array,
    below: Option<&Array>,
    counts: &Counts,
    penalties: &Penalties,
) -> Result<Array> {
    let zero = uploads::float(0.0);
    let used = counts.output.gt(&zero)?;
    let seen = counts.prompt.logical_or(&used)?;
    let scores = match below {
        None => select(seen, repeated(scores, &penalties.repetition)?, scores)?,
        Some(below) => {
            let repeated = repeated(&scores.add(below)?, &penalties.repetition)?;
            // Without a penalty a score is to stay what it is to the bit.
            let seen = seen.logical_and(penalties.repetition.ne(uploads::float(1.0))?)?;
            select(seen, repeated.subtract(below)?, scores)?
        }
    };
    let frequency = counts.output.multiply(&penalties.frequency)?;
    let presence = select(used, &penalties.presence, zero)?;
    Ok(scores.subtract(frequency)?.subtract(presence)?)
}

fn repeated(scores: &Array, penalty: &Array) -> Result<Array> {
    let (smaller, larger) = (scores.divide(penalty)?, scores.multiply(penalty)?);
    Ok(select(scores.gt(uploads::float(0.0))?, smaller, larger)?)
}

/// What is added to the logits of some rows: biases, and −∞ for tokens that may not be drawn.
#[derive(Debug, Default)]
pub(in crate::sampling) struct Bias {
    /// Whether a row starts from nothing allowed.
    closed: Vec<bool>,
    /// Places of the flattened matrix that are open in such rows.
    open: Vec<u32>,
    added: Vec<(u32, f32)>,
}

impl Bias {
    /// Goes on to another row: that of a request with so many tokens of output.
    pub(in crate::sampling) fn row(
        &mut self,
        params: &SamplingParams,
        generated: u32,
        vocabulary: i32,
    ) {
        let place = |token: u32| self.closed.len() as u32 * vocabulary.unsigned_abs() + token;
        if let Some(allowed) = &params.allowed_tokens {
            self.open.extend(allowed.iter().map(|&token| place(token)));
        }
        let banned: HashSet<_> = params.banned_after(generated as usize).copied().collect();
        self.added.extend(params.logit_bias.iter().map(|&(token, bias)| (place(token), bias)));
        let mut banned: Vec<_> = banned.into_iter().collect();
        banned.sort_unstable();
        self.added.extend(banned.into_iter().map(|token| (place(token), f32::NEG_INFINITY)));
        self.closed.push(params.allowed_tokens.is_some());
    }

    /// All rows, `[N, V]`.
    pub(in crate::sampling) fn array(&self, vocabulary: i32) -> Result<Array> {
        let rows = self.closed.len() as i32;
        let base = self.closed.iter().map(|&closed| if closed { f32::NEG_INFINITY } else { 0.0 });
        let base = Array::from_slice(&base.collect::<Vec<_>>(), &[rows, 1]);
        let mut flat = broadcast_to(base, &[rows, vocabulary])?.reshape(&[-1])?;
        if !self.open.is_empty() {
            let count = self.open.len() as i32;
            let zeros = zeros_dtype(&[count, 1], flat.dtype())?;
            flat = scatter_single(flat, Array::from_slice(&self.open, &[count]), zeros, 0)?;
        }
        if !self.added.is_empty() {
            let count = self.added.len() as i32;
            let (places, values): (Vec<_>, Vec<_>) = self.added.iter().copied().unzip();
            let values = Array::from_slice(&values, &[count, 1]);
            flat = scatter_add_single(flat, Array::from_slice(&places, &[count]), values, 0)?;
        }
        Ok(flat.reshape(&[rows, vocabulary])?)
    }
}
