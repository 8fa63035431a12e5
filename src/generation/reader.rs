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
        self.kvs = kvs.iter().map(PagedKv::new).collect::<Result<_>>()?;
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

    fn written(&self) -> impl Iterator<Item = &Array> {
        self.kvs.iter().flat_map(PagedKv::arrays)
    }
}

/// The tokens that a step reads.
pub(super) struct Tokens<'a> {
    /// Of each row, or [`AWAITED`].
    pub(super) known: &'a [u32],
    /// What a step draws that still runs, `[R]`, u32, and whose places in it the rows of awaited tokens have, in order.
    pub(super) drawn: Option<(&'a Array, Vec<usize>)>,
}

impl<'a> Tokens<'a> {
    /// None of which is awaited.
    pub(super) fn known(known: &'a [u32]) -> Self {
        Self { known, drawn: None }
    }

    /// `[count, 1]`, with zeros after the last.
    fn rows(&self, count: i32) -> Result<Array> {
        let mut known = self.known.to_vec();
        known.resize(count.unsigned_abs() as usize, 0);
        let Some((drawn, places)) = &self.drawn else {
            return Ok(Array::from_slice(&known, &[count, 1]));
        };
        if places.len() == known.len() && places.iter().copied().eq(0..drawn.size()) {
            return Ok(drawn.expand_dims(1)?);
        }
        let mut from = (0..count).collect::<Vec<_>>();
        let awaited = from.iter_mut().zip(&mut known).filter(|(_, token)| **token == AWAITED);
        for ((from, token), place) in awaited.zip(places) {
            (*from, *token) = (count + *place as i32, 0);
        }
        let all = concatenate(&[&Array::from_slice(&known, &[count]), drawn], 0)?;
        Ok(all.take_axis(uploads::integers(from), 0)?.expand_dims(1)?)
    }
}
