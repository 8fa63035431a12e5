//! A model with the keys and values of what it has read.

use mlx_rs::{
    Array,
    ops::concatenate,
    transforms::{async_eval, eval},
};

use super::{model::CausalModel, scheduler::AWAITED};
use crate::{
    attention::KvCache,
    cache::{PagedKv, PagedKvOptions, PagedLayer, PagedStep},
    check::{Check, axes},
    error::Result,
    ffi::synchronize,
    kernel::Sole,
    uploads,
};

const CHECK: Check = Check::op("CausalModel");

pub(super) struct Reader<M> {
    model: M,
    kvs: Vec<PagedKv>,
}

impl<M: CausalModel> Reader<M> {
    /// Without caches, until it gets some.
    pub(super) fn new(model: M) -> Self {
        Self { model, kvs: Vec::new() }
    }

    /// Takes empty caches of these sizes in place of any that it has.
    pub(super) fn reset(&mut self, kvs: &[PagedKvOptions]) -> Result<()> {
        self.kvs.clear();
        // What a failed step has left underway may hold the old ones.
        synchronize()?;
        // SAFETY: the caches are made here, and none of their arrays leaves them. What attends to them takes what a kernel
        // passes on. A step is handed over when the one before has ended, or awaits its tokens.
        let promise = unsafe { Sole::promise() };
        let kv = |options| Ok(PagedKv::new(options)?.sole(promise));
        self.kvs = kvs.iter().map(kv).collect::<Result<_>>()?;
        self.settle([])
    }

    pub(super) fn vocabulary(&self) -> i32 {
        self.model.vocabulary()
    }

    /// What the model says of each row, `[T, 1, dims]`; `tokens` are those of the first rows.
    pub(super) fn read(&mut self, step: &PagedStep, tokens: &Tokens) -> Result<Array> {
        let copies = self.kvs.iter_mut().map(|kv| kv.gather(step)).collect::<Result<Vec<_>>>()?;
        eval(copies.iter().flatten())?;
        let tokens = tokens.rows(step.rows())?;
        let mut layers = self.kvs.iter_mut().map(|kv| kv.layer(step)).collect::<Vec<PagedLayer>>();
        let mut caches =
            layers.iter_mut().map(|layer| layer as &mut dyn KvCache).collect::<Vec<_>>();
        Ok(self.model.hidden(&tokens, &mut caches)?)
    }

    /// The logits after some of the rows, `[R, V]`.
    pub(super) fn logits(&mut self, hidden: &Array, rows: &[i32]) -> Result<Array> {
        let count = rows.len() as i32;
        let logits = match rows.iter().copied().eq(0..hidden.dim(0)) {
            true => self.model.logits(hidden)?,
            false => self.model.logits(&hidden.take_axis(uploads::integers(rows.to_vec()), 0)?)?,
        };
        CHECK.shape("logits", &logits, axes![count, 1, self.model.vocabulary()])?;
        Ok(logits.squeeze_axes(&[1])?)
    }

    /// Evaluates these arrays, and what the step wrote.
    pub(super) fn settle<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        Ok(eval(arrays.into_iter().chain(self.written()))?)
    }

    /// Hands these arrays to the device, and what the step wrote.
    pub(super) fn submit<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        Ok(async_eval(arrays.into_iter().chain(self.written()))?)
    }

    /// Whether the step that was read last writes all its tokens where they go, whatever else is underway.
    pub(super) fn reads_in_place(&self) -> bool {
        self.kvs.iter().all(PagedKv::was_written_in_place)
    }

    fn written(&self) -> impl Iterator<Item = &Array> {
        self.kvs.iter().flat_map(PagedKv::arrays)
    }
}

/// The tokens that a step reads.
pub(super) struct Tokens<'a> {
    /// Of each row, or [`AWAITED`].
    pub(super) known: &'a [u32],
    /// Where awaited ones are, if there are any.
    pub(super) awaited: Option<DrawnTokens<'a>>,
}

/// Tokens that the step underway draws.
pub(super) struct DrawnTokens<'a> {
    /// Of all its rows, `[R]`, u32.
    pub(super) all: &'a Array,
    /// The rows of those that are awaited, in order.
    pub(super) rows: Vec<usize>,
}

impl<'a> Tokens<'a> {
    /// None of which is awaited.
    pub(super) fn known(known: &'a [u32]) -> Self {
        Self { known, awaited: None }
    }

    /// `[count, 1]`, with zeros after the last.
    fn rows(&self, count: i32) -> Result<Array> {
        let mut known = self.known.to_vec();
        known.resize(count.unsigned_abs() as usize, 0);
        let Some(DrawnTokens { all: drawn, rows }) = &self.awaited else {
            return Ok(Array::from_slice(&known, &[count, 1]));
        };
        if rows.len() == known.len() && rows.iter().copied().eq(0..drawn.size()) {
            return Ok(drawn.expand_dims(1)?);
        }
        let mut from = (0..count).collect::<Vec<_>>();
        let awaited = from.iter_mut().zip(&mut known).filter(|(_, token)| **token == AWAITED);
        for ((from, token), row) in awaited.zip(rows) {
            (*from, *token) = (count + *row as i32, 0);
        }
        let all = concatenate(&[&Array::from_slice(&known, &[count]), drawn], 0)?;
        Ok(all.take_axis(uploads::integers(from), 0)?.expand_dims(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awaited_tokens_come_from_the_draw_and_rows_of_nothing_are_zero() -> Result<()> {
        let drawn = Array::from_slice(&[10_u32, 11, 12], &[3]);
        let rows = |known: &[u32], rows: &[usize], count| -> Result<Vec<u32>> {
            let awaited = DrawnTokens { all: &drawn, rows: rows.to_vec() };
            let tokens = Tokens { known, awaited: Some(awaited) }.rows(count)?;
            assert_eq!(tokens.shape(), [count, 1]);
            Ok(tokens.flatten(None, None)?.as_slice::<u32>().to_vec())
        };
        const A: u32 = AWAITED;
        assert_eq!(rows(&[A, A, A], &[0, 1, 2], 3)?, [10, 11, 12]);
        assert_eq!(rows(&[A, A, A], &[2, 0, 1], 3)?, [12, 10, 11]);
        assert_eq!(rows(&[A, A, A], &[0, 1, 2], 4)?, [10, 11, 12, 0]);
        assert_eq!(rows(&[A, A], &[0, 1], 2)?, [10, 11]);
        assert_eq!(rows(&[7, A, 8, 9, A], &[2, 0], 8)?, [7, 12, 8, 9, 10, 0, 0, 0]);
        let known = Tokens::known(&[5, 6]).rows(4)?;
        assert_eq!(known.as_slice::<u32>(), [5, 6, 0, 0]);
        Ok(())
    }
}
