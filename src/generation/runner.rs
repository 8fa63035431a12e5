//! One step from tokens to tokens.

use mlx_rs::{Array, transforms::async_eval};

use super::{
    constrained::Constraints,
    model::CausalModel,
    reader::Reader,
    samplers::{Drawn, Samplers, Text},
    scheduler::{Batch, Key},
};
use crate::{cache::PagedKvOptions, error::Result, kernel::inference, sampling::LogProbabilities};

pub(super) struct Runner<M> {
    reader: Reader<M>,
    samplers: Samplers,
}

impl<M: CausalModel> Runner<M> {
    /// With empty caches of these sizes.
    pub(super) fn new(
        model: M,
        kvs: &[PagedKvOptions],
        log_probabilities: LogProbabilities,
    ) -> Result<Self> {
        let samplers = Samplers::new(model.vocabulary(), log_probabilities);
        let mut runner = Self { reader: Reader::new(model), samplers };
        runner.reset(kvs)?;
        Ok(runner)
    }

    /// Takes new caches for those that a failed step left behind.
    pub(super) fn reset(&mut self, kvs: &[PagedKvOptions]) -> Result<()> {
        self.rest();
        self.reader.reset(kvs)
    }

    /// Forgets how texts have drawn: there are none.
    pub(super) fn rest(&mut self) {
        self.samplers.clear();
    }

    /// Runs a step, and draws for `texts`, those of [`Batch::drawn`] in order, what `constraints` allow. How others drew is
    /// remembered where they are `alive`.
    pub(super) fn run(
        &mut self,
        batch: &Batch,
        texts: &[Text],
        constraints: &mut Constraints,
        alive: impl Fn(Key) -> bool,
    ) -> Result<Vec<Vec<Drawn>>> {
        inference(|| self.run_in_order(batch, texts, constraints, alive))
    }

    fn run_in_order(
        &mut self,
        batch: &Batch,
        texts: &[Text],
        constraints: &mut Constraints,
        alive: impl Fn(Key) -> bool,
    ) -> Result<Vec<Vec<Drawn>>> {
        let hidden = self.reader.read(&batch.step, &batch.tokens)?;
        if texts.is_empty() {
            self.reader.settle([&hidden])?;
            return Ok(Vec::new());
        }
        let rows = batch.drawn.iter().flat_map(|drawing| drawing.rows()).collect::<Vec<_>>();
        let logits = self.reader.logits(&hidden, &rows)?;
        if texts.iter().any(|text| text.request.constraint.is_some()) {
            // The model computes while the constraints are asked.
            async_eval([&logits])?;
        }
        let masks = constraints.masks(self.reader.vocabulary(), texts);
        let settle = |arrays: &[&Array]| self.reader.settle(arrays.iter().copied());
        self.samplers.draw(texts, &logits, &masks, alive, settle)
    }
}
