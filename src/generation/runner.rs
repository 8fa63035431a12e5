//! The model, its caches and its samplers: one step from tokens to tokens.

use std::collections::HashMap;

use mlx_rs::{
    Array, Dtype,
    transforms::{async_eval, eval},
};

use super::{
    constrained::Constraints,
    model::CausalModel,
    request::GenerationRequest,
    scheduler::{Batch, Key},
};
use crate::{
    attention::KvCache,
    cache::{PagedKv, PagedKvOptions, PagedLayer},
    check::{Check, axes},
    error::Result,
    kernel::inference,
    sampling::{LogProbabilities, SamplerBatch, SamplerBatchOptions, SamplingParams, TokenHistory},
};

const CHECK: Check = Check::op("CausalModel");

/// A token for one text.
#[derive(Debug, Clone)]
pub(super) struct Drawn {
    pub(super) token: u32,
    pub(super) log_probability: f32,
    pub(super) top: Vec<(u32, f32)>,
}

/// How a text draws, and what it has so far.
pub(super) struct Draws<'a> {
    pub(super) request: &'a GenerationRequest,
    pub(super) choice: u32,
    pub(super) prompt: &'a [u32],
    pub(super) output: &'a [u32],
}

impl Draws<'_> {
    fn params(&self) -> SamplingParams {
        let params = self.request.sampling.clone();
        SamplingParams { seed: params.seed.wrapping_add(self.choice.into()), ..params }
    }
}

pub(super) struct Runner<M> {
    model: M,
    kvs: Vec<PagedKv>,
    log_probabilities: LogProbabilities,
    sampling: Option<Sampling>,
    /// Of texts that were not drawn for in the last step.
    histories: HashMap<Key, TokenHistory>,
}

/// The texts that were drawn for in the last step.
struct Sampling {
    keys: Vec<Key>,
    top: i32,
    batch: SamplerBatch,
}

impl<M: CausalModel> Runner<M> {
    /// With empty caches of these sizes.
    pub(super) fn new(
        model: M,
        kvs: &[PagedKvOptions],
        log_probabilities: LogProbabilities,
    ) -> Result<Self> {
        let kvs = kvs.iter().map(PagedKv::new).collect::<Result<_>>()?;
        let runner =
            Self { model, kvs, log_probabilities, sampling: None, histories: HashMap::new() };
        runner.settle([])?;
        Ok(runner)
    }

    /// Takes new caches for those that a failed step left behind.
    pub(super) fn reset(&mut self, kvs: &[PagedKvOptions]) -> Result<()> {
        self.rest();
        self.kvs.clear();
        self.kvs = kvs.iter().map(PagedKv::new).collect::<Result<_>>()?;
        self.settle([])
    }

    /// Forgets how texts have drawn: there are none.
    pub(super) fn rest(&mut self) {
        (self.sampling, self.histories) = (None, HashMap::new());
    }

    /// Runs a step, and draws a token for each of [`Batch::drawn`], in order, of those that `constraints` allow. `draws`
    /// knows every text that has not ended.
    pub(super) fn run<'a>(
        &mut self,
        batch: &Batch,
        draws: impl Fn(Key) -> Option<Draws<'a>>,
        constraints: &mut Constraints,
    ) -> Result<Vec<Drawn>> {
        inference(|| self.run_in_order(batch, draws, constraints))
    }

    fn run_in_order<'a>(
        &mut self,
        batch: &Batch,
        draws: impl Fn(Key) -> Option<Draws<'a>>,
        constraints: &mut Constraints,
    ) -> Result<Vec<Drawn>> {
        let hidden = self.read(batch)?;
        if batch.drawn.is_empty() {
            self.settle([&hidden])?;
            return Ok(Vec::new());
        }
        let rows = batch.drawn.iter().map(|(_, row)| *row).collect::<Vec<_>>();
        let last = hidden.take_axis(Array::from_slice(&rows, &[rows.len() as i32]), 0)?;
        let logits = self.model.logits(&last)?;
        CHECK.shape("logits", &logits, axes![rows.len() as i32, 1, self.model.vocabulary()])?;
        let logits = logits.squeeze_axes(&[1])?;
        self.draw(batch, &logits, draws, constraints)
    }

    /// What the model says of each row, `[T, 1, dims]`.
    fn read(&mut self, batch: &Batch) -> Result<Array> {
        let step = &batch.step;
        let copies = self.kvs.iter_mut().map(|kv| kv.gather(step)).collect::<Result<Vec<_>>>()?;
        eval(copies.iter().flatten())?;
        let mut tokens = batch.tokens.clone();
        tokens.resize(step.rows().unsigned_abs() as usize, 0);
        let tokens = Array::from_slice(&tokens, &[step.rows(), 1]);
        let mut layers = self.kvs.iter_mut().map(|kv| kv.layer(step)).collect::<Vec<PagedLayer>>();
        let mut caches =
            layers.iter_mut().map(|layer| layer as &mut dyn KvCache).collect::<Vec<_>>();
        Ok(self.model.hidden(&tokens, &mut caches)?)
    }

    fn draw<'a>(
        &mut self,
        batch: &Batch,
        logits: &Array,
        draws: impl Fn(Key) -> Option<Draws<'a>>,
        constraints: &mut Constraints,
    ) -> Result<Vec<Drawn>> {
        let keys = batch.drawn.iter().map(|(key, _)| *key).collect::<Vec<_>>();
        let (alive, draws) =
            (|key: &Key| draws(*key).is_some(), keys.iter().map(|key| draws(*key)));
        let draws = draws.collect::<Option<Vec<_>>>();
        let draws = CHECK.known(draws, "batch", "hold texts that have not ended", "others")?;
        let positions = draws.iter().map(|text| (text.prompt.len() + text.output.len()) as i32);
        let positions = positions.collect::<Vec<_>>();
        let positions = Array::from_slice(&positions, &[positions.len() as i32]);
        let mut sampling = self.sampling_for(keys, &draws, alive)?;
        if draws.iter().any(|text| text.request.constraint.is_some()) {
            // The model computes while the constraints are asked.
            async_eval([logits])?;
        }
        let texts = sampling.keys.iter().copied().zip(&draws);
        let masks = constraints.masks(self.model.vocabulary(), texts);
        let sampled = sampling.batch.sample_masked(logits, &positions, &masks)?;
        sampling.batch.advance(&sampled)?;
        self.sampling = Some(sampling);
        let top = sampled.top.as_ref().map(|top| [&top.tokens, &top.log_probabilities]);
        let log_probabilities = sampled.log_probabilities.as_dtype(Dtype::Float32)?;
        self.settle(
            [&sampled.tokens, &log_probabilities].into_iter().chain(top.into_iter().flatten()),
        )?;
        let tops = match top {
            Some([tokens, log_probabilities]) => {
                let width = tokens.dim(-1).unsigned_abs() as usize;
                let pairs = tokens.as_slice::<u32>().iter().copied();
                let pairs = pairs.zip(log_probabilities.as_slice::<f32>().iter().copied());
                pairs.collect::<Vec<_>>().chunks(width).map(<[_]>::to_vec).collect()
            }
            None => vec![Vec::new(); draws.len()],
        };
        let tokens =
            sampled.tokens.as_slice::<u32>().iter().zip(log_probabilities.as_slice::<f32>());
        let drawn = tokens.zip(tops);
        let drawn =
            drawn.map(|((&token, &log_probability), top)| Drawn { token, log_probability, top });
        Ok(drawn.collect())
    }

    /// The samplers of these texts: those of the last step, where it drew for the same ones.
    fn sampling_for(
        &mut self,
        keys: Vec<Key>,
        draws: &[Draws],
        alive: impl Fn(&Key) -> bool,
    ) -> Result<Sampling> {
        let top = draws.iter().map(|text| text.request.top_log_probabilities).max();
        let (top, vocabulary) = (top.unwrap_or_default(), self.model.vocabulary());
        if let Some(sampling) = self.sampling.take() {
            if sampling.keys == keys && sampling.top == top {
                return Ok(sampling);
            }
            self.histories.extend(sampling.keys.into_iter().zip(sampling.batch.into_histories()?));
            self.histories.retain(|key, _| alive(key));
        }
        let requests = keys.iter().zip(draws).map(|(key, text)| {
            let params = text.params();
            let history = match self.histories.remove(key) {
                Some(history) => history,
                None => TokenHistory::new(&params, vocabulary, text.prompt, text.output)?,
            };
            Ok((params, history))
        });
        let requests = requests.collect::<Result<Vec<_>>>()?;
        let log_probabilities = self.log_probabilities;
        let options = SamplerBatchOptions { log_probabilities, top, ..Default::default() };
        let batch = SamplerBatch::new(requests, vocabulary, options)?;
        Ok(Sampling { keys, top, batch })
    }

    /// Evaluates these arrays, and what the step wrote.
    fn settle<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        let written = self.kvs.iter().flat_map(|kv| [kv.key_blocks(), kv.value_blocks()]);
        Ok(eval(arrays.into_iter().chain(written))?)
    }
}
