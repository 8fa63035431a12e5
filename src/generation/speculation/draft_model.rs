//! Drafts by a smaller model.

use std::{collections::BTreeMap, fmt};

use mlx_rs::{
    Array,
    ops::{indexing::TryIndexOp, stack},
};

use super::{Draft, DraftedText, Drafter, TextId};
use crate::{
    attention::BlockForm,
    cache::{PagedKvOptions, PagedPool, PagedPoolOptions, PagedStep, SequenceId},
    check::Check,
    dispatch::Context,
    error::Result,
    generation::{
        model::{CausalModel, kvs, token_bytes},
        reader::Reader,
        scheduler::rows_for,
    },
    kernel::inference,
    sampling::{SamplerBatch, SamplingParams, Step, TokenHistory},
    splitmix::scramble,
};

const CHECK: Check = Check::op("DraftModel");
/// Steps of a chain that look at nothing but the logits.
const STATELESS: [Step; 4] = [Step::Temperature, Step::TopK, Step::TopP, Step::MinP];

/// Options of [`DraftModel`].
#[derive(Debug, Clone)]
pub struct DraftModelOptions {
    /// What its keys and values of all texts take, in bytes. Texts that it has no room for go without drafts. Default: 256 MiB.
    pub cache_bytes: usize,
    /// How its keys are kept. Default: as the model makes them.
    pub cache_keys: BlockForm,
    /// How its values are kept, likewise.
    pub cache_values: BlockForm,
    /// How many tokens it reads at most before a step, of all texts together: those of long prompts get drafts some steps
    /// later. Default: 512.
    pub max_batch_tokens: usize,
}

impl Default for DraftModelOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 256 << 20,
            cache_keys: BlockForm::Plain,
            cache_values: BlockForm::Plain,
            max_batch_tokens: 512,
        }
    }
}

/// A smaller model of the same vocabulary, whose draws are drafts: by a request's temperature, top-k, top-p and min-p.
///
/// It has keys and values of its own, and reads what it has not read of a text before it drafts.
pub struct DraftModel<M> {
    reader: Reader<M>,
    kvs: Vec<PagedKvOptions>,
    options: PagedPoolOptions,
    max_batch_tokens: usize,
    /// None until it is first asked, for MLX evaluates arrays on the thread that made them; and after it has failed.
    texts: Option<Texts>,
}

impl<M> fmt::Debug for DraftModel<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DraftModel")
            .field("kvs", &self.kvs)
            .field("max_batch_tokens", &self.max_batch_tokens)
            .finish_non_exhaustive()
    }
}

/// What it has read.
struct Texts {
    pool: PagedPool,
    sequences: BTreeMap<TextId, SequenceId>,
}

impl<M: CausalModel> DraftModel<M> {
    /// A drafter by `model`, whose weights must be evaluated.
    ///
    /// # Errors
    /// When `cache_bytes` holds fewer than two blocks, or `max_batch_tokens` is zero.
    pub fn new(model: M, options: DraftModelOptions) -> Result<Self> {
        let DraftModelOptions { cache_bytes, cache_keys, cache_values, max_batch_tokens } = options;
        let forms = [cache_keys, cache_values];
        CHECK.value(max_batch_tokens > 0, "max_batch_tokens", "be at least 1", max_batch_tokens)?;
        let block_size = PagedPoolOptions::DEFAULT_BLOCK_SIZE;
        let token_bytes = token_bytes(&model, forms);
        let options = PagedPoolOptions::within(cache_bytes, token_bytes, block_size)?;
        let kvs = kvs(&model, options.blocks, block_size, forms);
        Ok(Self { reader: Reader::new(model), kvs, options, max_batch_tokens, texts: None })
    }

    /// What it has read; on the thread that drafts, where nothing was.
    fn texts(&mut self) -> Result<Texts> {
        if let Some(texts) = self.texts.take() {
            return Ok(texts);
        }
        self.reader.reset(&self.kvs)?;
        let pool = PagedPool::new(self.options.clone())?;
        Ok(Texts { pool, sequences: BTreeMap::new() })
    }

    fn draft_all(&mut self, texts: &[DraftedText], read: &mut Texts) -> Result<Vec<Draft>> {
        let ready = self.catch_up(texts, read)?;
        let mut drafts = vec![Draft::default(); texts.len()];
        let Some(Ready { places, logits }) = ready else { return Ok(drafts) };
        let ready = places.iter().map(|&place| &texts[place]).collect::<Vec<_>>();
        let drawn = self.write(&ready, logits, read)?;
        for (place, draft) in places.into_iter().zip(drawn) {
            drafts[place] = draft;
        }
        Ok(drafts)
    }

    /// Reads what is new of each text, up to a chunk; returns those of which all is read.
    fn catch_up(&mut self, texts: &[DraftedText], read: &mut Texts) -> Result<Option<Ready>> {
        let (mut sequences, mut tokens) = (Vec::new(), 0);
        let (mut places, mut ends) = (Vec::new(), Vec::new());
        for (place, text) in texts.iter().enumerate() {
            let Some((sequence, unread)) = read.open(text, texts)? else { continue };
            let chunk = unread.min(self.max_batch_tokens - tokens);
            if chunk == 0 {
                continue;
            }
            let from = text.len() - unread;
            let chunk = text.tokens(from).take(chunk).collect::<Vec<_>>();
            read.pool.append(sequence, &chunk)?;
            if chunk.len() == unread {
                places.push(place);
                ends.push(sequences.len());
            }
            sequences.push(sequence);
            tokens += chunk.len();
        }
        if sequences.is_empty() {
            return Ok(None);
        }
        let (step, hidden) = self.read(&sequences, tokens, read)?;
        read.pool.computed(&step)?;
        if places.is_empty() {
            self.reader.settle([&hidden])?;
            return Ok(None);
        }
        let rows = step.last_rows();
        let rows = ends.into_iter().map(|end| rows[end]).collect::<Vec<_>>();
        Ok(Some(Ready { places, logits: self.reader.logits(&hidden, &rows)? }))
    }

    /// Reads the appended tokens of these sequences, so many between them.
    fn read(
        &mut self,
        sequences: &[SequenceId],
        tokens: usize,
        read: &mut Texts,
    ) -> Result<(PagedStep, Array)> {
        let step = read.pool.step(sequences, rows_for(tokens, Context::current()?.target))?;
        let hidden = self.reader.read(&step, None)?;
        Ok((step, hidden))
    }

    /// Draws token after token for all texts, from `logits` on.
    fn write(
        &mut self,
        texts: &[&DraftedText],
        mut logits: Array,
        read: &mut Texts,
    ) -> Result<Vec<Draft>> {
        let vocabulary = self.reader.vocabulary();
        let samplers = samplers(texts, vocabulary)?;
        let sequences = texts.iter().filter_map(|text| read.sequences.get(&text.id).copied());
        let sequences = sequences.collect::<Vec<_>>();
        let limit = texts.iter().map(|text| text.limit).max().unwrap_or_default();
        let (mut tokens, mut probabilities) = (vec![Vec::new(); texts.len()], Vec::new());
        for count in 0..limit {
            let positions = texts.iter().map(|text| (text.len() + count) as i32);
            let positions = positions.collect::<Vec<_>>();
            let positions = Array::from_slice(&positions, &[positions.len() as i32]);
            let sampled = samplers.sample(&logits, &positions)?;
            probabilities.push(samplers.probabilities(&logits, &positions)?);
            self.reader.settle([&sampled.tokens])?;
            let drawn = sampled.tokens.as_slice::<u32>();
            tokens.iter_mut().zip(drawn).for_each(|(tokens, &token)| tokens.push(token));
            if count + 1 == limit || !read.append(&sequences, drawn)? {
                break;
            }
            let (step, hidden) = self.read(&sequences, drawn.len(), read)?;
            logits = self.reader.logits(&hidden, &step.last_rows())?;
        }
        let probabilities = stack(&probabilities, 1)?;
        let draft = |((place, text), mut tokens): ((i32, &&DraftedText), Vec<u32>)| {
            tokens.truncate(text.limit);
            let probabilities = match text.sampling.is_greedy() {
                true => None,
                false => Some(probabilities.try_index(place)?),
            };
            Ok(Draft { tokens, probabilities })
        };
        (0..).zip(texts).zip(tokens).map(draft).collect()
    }
}

/// Those of the texts, by place, of which all is read, and the logits after them.
struct Ready {
    places: Vec<usize>,
    logits: Array,
}

impl Texts {
    /// The sequence of a text, cut to what the text still has, and how many tokens of it are not read, the last one among
    /// them. None if there is no room to read and to draft; those that wait while these `texts` write give theirs first.
    fn open(
        &mut self,
        text: &DraftedText,
        texts: &[DraftedText],
    ) -> Result<Option<(SequenceId, usize)>> {
        let sequence = match self.sequences.get(&text.id) {
            Some(&sequence) => sequence,
            None => {
                let tokens = text.tokens(0).collect::<Vec<_>>();
                let sequence = self.pool.open(&tokens, b"")?;
                self.sequences.insert(text.id, sequence);
                sequence
            }
        };
        let same = self.pool.tokens(sequence)?.iter().copied().zip(text.tokens(0));
        let same = same.take_while(|(read, token)| read == token).count().min(text.len() - 1);
        self.pool.truncate(sequence, same as i32)?;
        let unread = text.len() - same;
        let needed = self.pool.blocks_for(sequence, unread + text.limit)?;
        if needed > self.pool.available_blocks() {
            let writes = |id: &TextId| texts.iter().any(|text| text.id == *id);
            let waiting = self.sequences.keys().copied().filter(|id| !writes(id));
            waiting.collect::<Vec<_>>().into_iter().try_for_each(|id| self.close(id))?;
        }
        if needed > self.pool.available_blocks() {
            self.close(text.id)?;
            return Ok(None);
        }
        Ok(Some((sequence, unread)))
    }

    /// Gives each sequence a token, if there is room for all.
    fn append(&mut self, sequences: &[SequenceId], tokens: &[u32]) -> Result<bool> {
        let needed = sequences.iter().map(|&sequence| self.pool.blocks_for(sequence, 1));
        if needed.sum::<Result<usize>>()? > self.pool.available_blocks() {
            return Ok(false);
        }
        let mut pairs = sequences.iter().zip(tokens);
        pairs.try_for_each(|(&sequence, &token)| self.pool.append(sequence, &[token]))?;
        Ok(true)
    }

    fn close(&mut self, text: TextId) -> Result<()> {
        self.sequences.remove(&text).map_or(Ok(()), |sequence| self.pool.close(sequence))
    }
}

/// Samplers that draw as the texts do, by other bits, and without what looks at more than logits.
fn samplers(texts: &[&DraftedText], vocabulary: i32) -> Result<SamplerBatch> {
    let rows = texts.iter().map(|text| {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = *text.sampling;
        let chain = text.sampling.chain.iter().copied().filter(|step| STATELESS.contains(step));
        let params = SamplingParams {
            seed: scramble(text.seed ^ 0x9216_D5D9_8979_FB1B),
            temperature,
            top_k,
            top_p,
            min_p,
            chain: chain.collect(),
            ..Default::default()
        };
        let history = TokenHistory::new(&params, vocabulary, &[], &[])?;
        Ok((params, history))
    });
    SamplerBatch::new(rows.collect::<Result<_>>()?, vocabulary, Default::default())
}

impl<M: CausalModel> Drafter for DraftModel<M> {
    fn vocabulary(&self) -> Option<i32> {
        Some(self.reader.vocabulary())
    }

    fn draft(&mut self, texts: &[DraftedText<'_>]) -> Result<Vec<Draft>> {
        let mut read = self.texts()?;
        let drafts = inference(|| self.draft_all(texts, &mut read))?;
        // What has failed is read anew.
        self.texts = Some(read);
        Ok(drafts)
    }

    fn end(&mut self, text: TextId) {
        let closed = self.texts.as_mut().map_or(Ok(()), |texts| texts.close(text));
        if closed.is_err() {
            self.texts = None;
        }
    }
}
