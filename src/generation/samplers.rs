//! How the texts of an engine draw, from step to step.

use std::collections::HashMap;

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, zeros_dtype},
    transforms::eval,
};

use super::{
    request::GenerationRequest,
    scheduler::Key,
    speculation::{DraftedText, TextId},
};
use crate::{
    error::Result,
    sampling::{
        Conditions, LogProbabilities, Proposal, Sampled, SamplerBatch, SamplerBatchOptions,
        SamplingParams, TokenHistory, TokenMask,
    },
};

/// A token for one text.
#[derive(Debug, Clone)]
pub(super) struct Drawn {
    pub(super) token: u32,
    pub(super) log_probability: f32,
    pub(super) top: Vec<(u32, f32)>,
}

/// A text that draws: what it has, and what is guessed of it.
pub(super) struct Text<'a> {
    pub(super) key: Key,
    pub(super) request: &'a GenerationRequest,
    pub(super) prompt: &'a [u32],
    /// The last token may be awaited.
    pub(super) output: &'a [u32],
    /// The tokens that its further rows hold.
    pub(super) drafts: &'a [u32],
    /// What each of them was drawn by, `[at least as many, V]`; none for those that come of no draw.
    pub(super) draft_probabilities: Option<&'a Array>,
}

impl<'a> Text<'a> {
    /// The seed by which it draws.
    fn seed(&self) -> u64 {
        self.request.sampling.seed.wrapping_add(self.key.choice.into())
    }

    fn params(&self) -> SamplingParams {
        SamplingParams { seed: self.seed(), ..self.request.sampling.clone() }
    }

    /// The same for a drafter.
    pub(super) fn drafted(&self, limit: usize) -> DraftedText<'a> {
        DraftedText {
            id: TextId(self.key),
            prompt: self.prompt,
            output: self.output,
            sampling: &self.request.sampling,
            seed: self.seed(),
            limit,
        }
    }
}

pub(super) struct Samplers {
    vocabulary: i32,
    log_probabilities: LogProbabilities,
    last: Option<Last>,
    /// Of texts that are not in the last batch.
    histories: HashMap<Key, TokenHistory>,
}

/// What is being drawn.
pub(super) struct Draws {
    sampled: Sampled,
    /// The texts that draw, and their drafts.
    texts: Vec<(Key, Vec<u32>)>,
    /// The batch, where texts have drafts, and go on from one of several rows.
    drafted: Option<Last>,
}

impl Draws {
    /// A token for each row, `[R]`, u32.
    pub(super) fn tokens(&self) -> &Array {
        &self.sampled.tokens
    }

    /// All that the host reads.
    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let top = self.sampled.top.iter().flat_map(|top| [&top.tokens, &top.log_probabilities]);
        [&self.sampled.tokens, &self.sampled.log_probabilities].into_iter().chain(top)
    }

    /// What was drawn for each row.
    fn host(&self) -> Result<Vec<Drawn>> {
        eval(self.arrays())?;
        let tokens = self.sampled.tokens.as_slice::<u32>();
        let tops = match &self.sampled.top {
            Some(top) => {
                let width = top.tokens.dim(-1).unsigned_abs() as usize;
                let pairs = top.tokens.as_slice::<u32>().iter().copied();
                let pairs = pairs.zip(top.log_probabilities.as_slice::<f32>().iter().copied());
                pairs.collect::<Vec<_>>().chunks(width).map(<[_]>::to_vec).collect()
            }
            None => vec![Vec::new(); tokens.len()],
        };
        let drawn = tokens.iter().zip(self.sampled.log_probabilities.as_slice::<f32>()).zip(tops);
        let drawn =
            drawn.map(|((&token, &log_probability), top)| Drawn { token, log_probability, top });
        Ok(drawn.collect())
    }
}

/// The batch of the last step.
struct Last {
    keys: Vec<Key>,
    top: i32,
    batch: SamplerBatch,
}

impl Samplers {
    pub(super) fn new(vocabulary: i32, log_probabilities: LogProbabilities) -> Self {
        Self { vocabulary, log_probabilities, last: None, histories: HashMap::new() }
    }

    pub(super) fn clear(&mut self) {
        (self.last, self.histories) = (None, HashMap::new());
    }

    /// What is drawn for each text: a token, and one more for each of its drafts up to the first that is not drawn. Each row,
    /// of `logits` and of the `positions` of what it draws, draws what its mask allows. Other texts are remembered where they
    /// are `alive`.
    pub(super) fn draw(
        &mut self,
        texts: &[Text],
        logits: &Array,
        positions: &Array,
        masks: &[Option<&TokenMask>],
        alive: impl Fn(Key) -> bool,
    ) -> Result<Draws> {
        let top = texts.iter().map(|text| text.request.top_log_probabilities).max();
        let mut last = self.batch(texts, top.unwrap_or_default(), alive)?;
        let drafted = proposal(texts, self.vocabulary)?;
        let proposal = drafted.as_ref();
        let proposal = proposal.map(|[tokens, probabilities]| Proposal { tokens, probabilities });
        let sampled =
            last.batch.sample_under(logits, positions, &Conditions { masks, proposal })?;
        last.batch.advance(&sampled)?;
        let drafted = match texts.iter().any(|text| !text.drafts.is_empty()) {
            true => Some(last),
            false => {
                self.last = Some(last);
                None
            }
        };
        let texts = texts.iter().map(|text| (text.key, text.drafts.to_vec())).collect();
        Ok(Draws { sampled, texts, drafted })
    }

    /// Waits for what is drawn.
    pub(super) fn finish(&mut self, draws: Draws) -> Result<Vec<Vec<Drawn>>> {
        let mut rows = draws.host()?.into_iter();
        let Draws { texts, drafted, .. } = draws;
        let drawn = texts.iter().map(|(_, drafts)| kept(drafts, rows.by_ref()));
        let drawn = drawn.collect::<Vec<_>>();
        if let Some(last) = drafted {
            self.keep(last, &texts, &drawn)?;
        }
        Ok(drawn)
    }

    /// A row for each token that may be drawn: the batch of the last step, where it has the same.
    fn batch(&mut self, texts: &[Text], top: i32, alive: impl Fn(Key) -> bool) -> Result<Last> {
        let keys = texts.iter().map(|text| text.key).collect::<Vec<_>>();
        let drafted = texts.iter().any(|text| !text.drafts.is_empty());
        if let Some(last) = self.last.take() {
            if last.keys == keys && last.top == top && !drafted {
                return Ok(last);
            }
            self.histories.extend(last.keys.into_iter().zip(last.batch.into_histories()?));
        }
        self.histories.retain(|key, _| alive(*key));
        let mut rows = Vec::new();
        for text in texts {
            let params = text.params();
            let mut history = match self.histories.remove(&text.key) {
                Some(history) => history,
                None => TokenHistory::new(&params, self.vocabulary, text.prompt, text.output)?,
            };
            for &draft in text.drafts {
                let next = history.push(&params, draft)?;
                rows.push((params.clone(), history));
                history = next;
            }
            rows.push((params, history));
        }
        let log_probabilities = self.log_probabilities;
        let options = SamplerBatchOptions { log_probabilities, top, ..Default::default() };
        Ok(Last { keys, top, batch: SamplerBatch::new(rows, self.vocabulary, options)? })
    }

    /// Keeps, of texts that had several rows, the history that each goes on from.
    fn keep(&mut self, last: Last, texts: &[(Key, Vec<u32>)], drawn: &[Vec<Drawn>]) -> Result<()> {
        let mut histories = last.batch.into_histories()?.into_iter();
        for ((key, drafts), drawn) in texts.iter().zip(drawn) {
            let of_text = histories.by_ref().take(1 + drafts.len());
            if let Some(history) = of_text.collect::<Vec<_>>().into_iter().nth(drawn.len() - 1) {
                self.histories.insert(*key, history);
            }
        }
        Ok(())
    }
}

/// What was drawn for a text with these drafts, the first of `rows`, up to the first that is not its draft.
fn kept(drafts: &[u32], rows: impl Iterator<Item = Drawn>) -> Vec<Drawn> {
    let rows = rows.take(1 + drafts.len()).collect::<Vec<_>>();
    let right = rows.iter().zip(drafts).take_while(|(drawn, draft)| drawn.token == **draft);
    let count = 1 + right.count();
    rows.into_iter().take(count).collect()
}

/// The drafts that were drawn, `[R]`, and by what, `[R, V]`; zeros in rows of others. None where there are only others.
fn proposal(texts: &[Text], vocabulary: i32) -> Result<Option<[Array; 2]>> {
    if texts.iter().all(|text| text.draft_probabilities.is_none()) {
        return Ok(None);
    }
    let (mut tokens, mut parts) = (Vec::new(), Vec::new());
    for text in texts {
        let count = text.drafts.len() as i32;
        tokens.extend(text.drafts.iter().copied().chain([0]));
        let drawn_by = text.draft_probabilities.filter(|_| count > 0);
        if let Some(probabilities) = drawn_by {
            parts.push(probabilities.try_index(..count)?);
        }
        let without = if drawn_by.is_some() { 1 } else { 1 + count };
        parts.push(zeros_dtype(&[without, vocabulary], Dtype::Float32)?);
    }
    let tokens = Array::from_slice(&tokens, &[tokens.len() as i32]);
    Ok(Some([tokens, concatenate(&parts, 0)?]))
}
