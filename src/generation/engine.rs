//! The engine's handle.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
};

use super::{
    client::Client,
    model::{CausalModel, token_bytes},
    options::GenerationEngineOptions,
    request::{Completion, GenerationRequest},
    speculation::Drafter,
    stats::{EngineStats, Shared, lock},
    stream::GenerationStream,
    worker::{Command, Worker},
};
use mlx_rs::error::Exception;

use crate::{cache::PagedPoolOptions, check::Check, error::Result, sampling::MAX_VOCABULARY};

const CHECK: Check = Check::op("GenerationEngine");

/// Generates many texts at once with one model, on a thread of its own.
///
/// - **Continuous batching.** Every step gives each running text one token, and the rest of its token budget to prompts, in
///   chunks, so that a long prompt never stalls the others.
/// - **Paged memory.** Keys and values are in blocks of one pool, which prompts with the same beginning share. When blocks run
///   out, the text that is last in order is preempted, and read again later.
/// - **Reproducible.** A text depends on its prompt, its parameters and its seed, and not on what else is served, except for how
///   a device rounds products of other sizes.
/// - **Isolated failures.** A step that fails ends the requests in it, with the reason; the others are read again and go on.
///   Mirostat starts anew in them.
///
/// The handle is `Send` and `Sync`. Dropping it waits until every text whose stream is still held has ended.
///
/// # Example
/// ```
/// use mlx_primitives::{
///     attention::KvCache,
///     generation::{CausalModel, GenerationEngine, GenerationEngineOptions, GenerationRequest, LayerKv},
///     sampling::SamplingParams,
/// };
/// use mlx_rs::{Array, error::Exception};
///
/// /// After every token comes the next.
/// struct Counting;
///
/// impl CausalModel for Counting {
///     fn vocabulary(&self) -> i32 {
///         10
///     }
///
///     fn layers(&self) -> Vec<LayerKv> {
///         Vec::new()
///     }
///
///     fn hidden(&mut self, tokens: &Array, _: &mut [&mut dyn KvCache]) -> Result<Array, Exception> {
///         tokens.expand_dims(-1)
///     }
///
///     fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
///         let next = hidden.add(Array::from_int(1))?;
///         next.eq(Array::arange::<_, u32>(0, 10, None)?)?.as_type::<f32>()
///     }
/// }
///
/// let engine = GenerationEngine::new(Counting, GenerationEngineOptions::default())?;
/// let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
/// let request = GenerationRequest { sampling: greedy, ..GenerationRequest::new(vec![1, 2], 4) };
/// assert_eq!(engine.generate(request)?[0].tokens, [3, 4, 5, 6]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Yu et al., [Orca: A Distributed Serving System for Transformer-Based Generative
/// Models](https://www.usenix.org/conference/osdi22/presentation/yu), 2022; Agrawal et al., [Taming Throughput-Latency
/// Tradeoff in LLM Inference with Sarathi-Serve](https://arxiv.org/abs/2403.02310), 2024.
#[derive(Debug)]
pub struct GenerationEngine {
    /// None while it is dropped.
    commands: Option<Sender<Command>>,
    shared: Arc<Mutex<Shared>>,
    named: AtomicU64,
    vocabulary: i32,
    detokenizes: bool,
    /// The most texts at once, and the blocks that they can have.
    texts: usize,
    blocks: usize,
    block_size: usize,
    thread: Option<JoinHandle<()>>,
}

impl GenerationEngine {
    /// Starts a thread that runs `model`, whose weights must be evaluated: MLX evaluates an array only on the thread that
    /// made it.
    ///
    /// # Errors
    /// When an option is out of its range, when `cache_bytes` holds fewer than two blocks, when the model has a vocabulary
    /// above 2^20 or a layer of sizes that make no cache, or when there is no memory or no thread for it.
    pub fn new<M: CausalModel + Send + 'static>(
        model: M,
        options: GenerationEngineOptions,
    ) -> Result<Self> {
        Self::start(model, None, options)
    }

    /// Starts a thread that runs `model`, and has `drafter` guess how texts go on.
    ///
    /// A step reads a text's draft with its last token, and the text gets those of its tokens that it would have drawn, and
    /// one more. Where a step takes as long for several tokens as for one, as on a device that waits for its memory, texts come
    /// faster as often as the guesses are right; many texts at once make full use of a device without it. Texts that draw by
    /// Mirostat, which must see each token, get no drafts.
    ///
    /// # Errors
    /// Those of [`Self::new`], and when the drafter has another vocabulary.
    pub fn with_drafter<M: CausalModel + Send + 'static>(
        model: M,
        drafter: impl Drafter + Send + 'static,
        options: GenerationEngineOptions,
    ) -> Result<Self> {
        let (vocabulary, drafted) = (model.vocabulary(), drafter.vocabulary());
        let (known, expected) = (
            drafted.unwrap_or(vocabulary),
            format_args!("have the model's vocabulary of {vocabulary}"),
        );
        CHECK.value(known == vocabulary, "drafter", expected, known)?;
        Self::start(model, Some(Box::new(drafter)), options)
    }

    fn start<M: CausalModel + Send + 'static>(
        model: M,
        drafter: Option<Box<dyn Drafter + Send>>,
        options: GenerationEngineOptions,
    ) -> Result<Self> {
        options.check(CHECK)?;
        let (vocabulary, texts) = (model.vocabulary(), options.texts_at_once());
        let known = (1..=MAX_VOCABULARY).contains(&vocabulary);
        CHECK.value(known, "model", "have a vocabulary of 1 to 2^20", vocabulary)?;
        let pool = PagedPoolOptions {
            share_prefixes: options.share_prefixes,
            salt: options.salt.clone(),
            eviction: options.eviction.clone(),
            ..PagedPoolOptions::within(
                options.cache_bytes,
                token_bytes(&model, options.forms()),
                PagedPoolOptions::DEFAULT_BLOCK_SIZE,
            )?
        };
        let (blocks, block_size) = (pool.blocks, pool.block_size);
        let detokenizes = options.detokenizer.is_some();
        let shared = Arc::<Mutex<Shared>>::default();
        let (commands, received) = mpsc::channel();
        let (tell, started) = mpsc::channel();
        let of_thread = shared.clone();
        // MLX evaluates an array only on the thread that made it, and devices are chosen by thread: all is made there.
        let work = move || match Worker::new(model, drafter, options, pool, of_thread) {
            Ok(worker) => {
                drop(tell.send(Ok(())));
                worker.run(&received);
            }
            Err(error) => drop(tell.send(Err(error))),
        };
        let thread = thread::Builder::new().name("generation".to_owned()).spawn(work);
        let thread = thread.map_err(|error| Exception::custom(error.to_string()))?;
        CHECK.known(started.recv().ok(), "thread", "start", "one that did not")??;
        Ok(Self {
            commands: Some(commands),
            shared,
            named: AtomicU64::new(0),
            vocabulary,
            detokenizes,
            texts,
            // One block is nobody's.
            blocks: (blocks - 1).unsigned_abs() as usize,
            block_size: block_size.unsigned_abs() as usize,
            thread: Some(thread),
        })
    }

    /// Hands in a request; what it gets comes in the stream. To drop the stream cancels it.
    ///
    /// # Errors
    /// When the prompt is empty or has an id that the vocabulary has not, `max_tokens` is zero, a stop string is empty or
    /// cannot be found for want of a detokenizer, a parameter is out of its range, a constraint is of another vocabulary,
    /// there are more texts than the engine writes at once, a request of this name has not ended, its texts could need more
    /// blocks than there are, or the engine has stopped.
    pub fn submit(&self, request: GenerationRequest) -> Result<GenerationStream> {
        let request = request.with_all_stops();
        request.check(self.vocabulary, self.detokenizes)?;
        self.check_room(&request)?;
        let id = self.named(request.id.clone())?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let (events, received) = mpsc::channel();
        let stream =
            GenerationStream::new(id.clone(), request.texts(), received, cancelled.clone());
        let client = Client::new(id, request, events, cancelled);
        if !self.tell(Command::Submit(Box::new(client))) {
            lock(&self.shared).ids.remove(stream.id());
            CHECK.value(false, "engine", "be running", "one that has stopped")?;
        }
        Ok(stream)
    }

    /// Waits for all texts of a request.
    ///
    /// # Errors
    /// As for [`Self::submit`].
    pub fn generate(&self, request: GenerationRequest) -> Result<Vec<Completion>> {
        Ok(self.submit(request)?.completions())
    }

    /// What the engine has done so far.
    pub fn stats(&self) -> EngineStats {
        lock(&self.shared).stats
    }

    /// Ends all requests and waits for the thread.
    pub fn shut_down(self) {
        self.tell(Command::Stop);
    }

    /// Whether the thread is there to hear it.
    fn tell(&self, command: Command) -> bool {
        self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok())
    }

    /// The texts fit into the engine, each as long as it may become.
    fn check_room(&self, request: &GenerationRequest) -> Result<()> {
        let texts = request.texts() as usize;
        CHECK.value(texts <= self.texts, "n", format_args!("be at most {}", self.texts), texts)?;
        let tokens = request.prompt.len().saturating_add(request.max_tokens);
        let needed = tokens.div_ceil(self.block_size).saturating_mul(texts);
        let expected = format_args!(
            "need at most {} blocks of {} tokens for prompt and max_tokens, which is what fits into cache_bytes,",
            self.blocks, self.block_size
        );
        CHECK.value(needed <= self.blocks, "request", expected, needed)
    }

    /// Takes a name that no request has.
    fn named(&self, asked: Option<String>) -> Result<String> {
        let mut shared = lock(&self.shared);
        let Some(id) = asked else {
            loop {
                let id = format!("request-{}", self.named.fetch_add(1, Ordering::Relaxed));
                if shared.ids.insert(id.clone()) {
                    return Ok(id);
                }
            }
        };
        let fresh = shared.ids.insert(id.clone());
        CHECK.value(fresh, "id", "be that of no other request", &id)?;
        Ok(id)
    }
}

impl Drop for GenerationEngine {
    /// Waits until what streams still wait for is done: MLX must not be left while a thread works with it.
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // What it panicked with, if it did, every stream has been told.
            drop(thread.join());
        }
    }
}
