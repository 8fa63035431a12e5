//! One step from tokens to tokens.

use std::collections::BTreeMap;

use mlx_rs::{Array, transforms::async_eval};
use tracing::Span;

use super::{
    constrained::Constraints,
    model::CausalModel,
    reader::{AwaitedTokens, Reader, of_rows},
    samplers::{Drawn, Draws, Samplers, Text},
    scheduler::{Batch, Key},
};
use crate::{
    cache::PagedKvOptions, check::Check, error::Result, ffi::synchronize, kernel::inference,
    sampling::LogProbabilities, uploads,
};

const CHECK: Check = Check::op("GenerationEngine");

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
        self.forget_draws();
        self.reader.reset(kvs)
    }

    /// Forgets how texts have drawn: there are none.
    pub(super) fn forget_draws(&mut self) {
        self.samplers.clear();
    }

    /// Puts a step together that draws for `texts`, those of [`Batch::drawn`] in order, what `constraints` allow. How others
    /// drew is remembered where they are `alive`. What the batch awaits, `before` draws.
    pub(super) fn build(
        &mut self,
        batch: &Batch,
        texts: &[Text],
        constraints: &mut Constraints,
        alive: impl Fn(Key) -> bool,
        before: Option<&Step>,
    ) -> Result<StepResult> {
        inference(|| {
            let awaited = match &*batch.awaiting {
                [] => None,
                _ => Some(CHECK.known(before, "batch", "follow another", "none")?.awaited(batch)?),
            };
            let hidden = self.reader.read(&batch.step, awaited.as_ref())?;
            Ok(match texts {
                [] => StepResult::Read(hidden),
                _ => StepResult::Draws(self.draw(batch, &hidden, texts, constraints, alive)?),
            })
        })
    }

    fn draw(
        &mut self,
        batch: &Batch,
        hidden: &Array,
        texts: &[Text],
        constraints: &mut Constraints,
        alive: impl Fn(Key) -> bool,
    ) -> Result<Draws> {
        let rows = batch.drawn.iter().flat_map(|drawing| drawing.rows()).collect::<Vec<_>>();
        let logits = self.reader.logits(hidden, &rows)?;
        if texts.iter().any(|text| text.request.constraint.is_some()) {
            // The model computes while the constraints are asked.
            async_eval([&logits])?;
        }
        let masks = constraints.masks(self.reader.vocabulary(), texts);
        let read = of_rows(batch.step.positions(), &rows)?;
        let positions = read.add(uploads::int(1))?;
        self.samplers.draw(texts, &logits, &positions, &masks, alive)
    }

    /// Whether a step may be handed over while the one before is underway.
    pub(super) fn follows_at_once(&self, batch: &Batch) -> bool {
        !batch.awaiting.is_empty() && self.reader.reads_in_place()
    }

    /// Hands a step to the device, which must have ended the one before unless it [follows at once](Self::follows_at_once).
    pub(super) fn submit(&self, result: &StepResult) -> Result<()> {
        if !self.reader.reads_in_place() {
            // MLX writes into blocks in place only where nothing holds any longer what the step before has read.
            synchronize()?;
        }
        match result {
            StepResult::Read(hidden) => self.reader.submit([hidden]),
            StepResult::Draws(draws) => self.reader.submit(draws.arrays()),
        }
    }

    /// Waits for a step, and returns what was drawn for each of its texts.
    pub(super) fn finish(&mut self, result: StepResult) -> Result<Vec<Vec<Drawn>>> {
        match result {
            StepResult::Draws(draws) => self.samplers.finish(draws),
            StepResult::Read(hidden) => {
                hidden.eval()?;
                Ok(Vec::new())
            }
        }
    }
}

/// A step, and what comes of it.
pub(super) struct Step {
    pub(super) batch: Batch,
    pub(super) result: StepResult,
    /// Of all that is done for it.
    pub(super) span: Span,
}

/// What comes of a step, once it is evaluated.
pub(super) enum StepResult {
    /// What the model says, after which nothing is drawn.
    Read(Array),
    Draws(Draws),
}

impl Step {
    /// The tokens that are drawn here and that the next batch awaits.
    fn awaited(&self, next: &Batch) -> Result<AwaitedTokens<'_>> {
        let texts = self.batch.drawn.iter().map(|drawing| drawing.key).zip(0..);
        let places = texts.collect::<BTreeMap<Key, i32>>();
        let rows = next.awaiting.iter().map(|(row, key)| Some((*row, *places.get(key)?)));
        let awaited = match &self.result {
            StepResult::Draws(draws) => rows
                .collect::<Option<Vec<_>>>()
                .map(|rows| AwaitedTokens { drawn: draws.tokens(), rows }),
            StepResult::Read(_) => None,
        };
        let texts = format_args!("{:?}", next.awaiting);
        CHECK.known(awaited, "batch", "await what is drawn", texts)
    }
}
