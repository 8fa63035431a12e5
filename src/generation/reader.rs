//! A model with the keys and values of what it has read.

use mlx_rs::{Array, transforms::eval};

use super::model::CausalModel;
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
    pub(super) fn read(&mut self, step: &PagedStep, tokens: &[u32]) -> Result<Array> {
        let copies = self.kvs.iter_mut().map(|kv| kv.gather(step)).collect::<Result<Vec<_>>>()?;
        eval(copies.iter().flatten())?;
        let mut tokens = tokens.to_vec();
        tokens.resize(step.rows().unsigned_abs() as usize, 0);
        let tokens = Array::from_slice(&tokens, &[step.rows(), 1]);
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
        let written = self.kvs.iter().flat_map(PagedKv::arrays);
        Ok(eval(arrays.into_iter().chain(written))?)
    }
}
