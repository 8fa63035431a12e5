//! How many tokens a second an engine writes on this machine, with random weights of a real model's shape.
//!
//! `cargo run --release --example throughput -- --shape smollm2-135m`
#![allow(clippy::print_stdout, reason = "a command line program prints")]

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use mlx_primitives::{
    attention::{BlockForm, KvCache},
    generation::{
        CausalModel, FinishReason, GenerationEngine, GenerationEngineOptions, GenerationRequest,
        LayerKv,
    },
    layers::{
        Attention, AttentionBuilder, AttentionInput, DecoderBlock, GatedFeedForward, Projection,
        TokenEmbedding,
    },
    norm::RmsNorm,
    quant::{QuantizedEmbedding, QuantizedLinear, QuantizedWeight},
    rope::Rope,
    sampling::SamplingParams,
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::{Module, ModuleParameters, Param},
    nn, random,
    transforms::eval,
};

/// Measures an engine over random weights.
#[derive(Debug, Parser)]
struct Args {
    /// Whose shape
    #[arg(long, value_enum, default_value_t = Shape::Smollm2_135m)]
    shape: Shape,

    /// How many requests; each has a prompt of 32 to 511 tokens and gets 32 to 159
    #[arg(long, default_value_t = 64)]
    requests: usize,

    /// How many are served at once
    #[arg(long, default_value_t = 32)]
    batch: usize,

    /// Packs the weights into so many bits, in groups of 64
    #[arg(long)]
    bits: Option<i32>,

    /// How keys and values are kept
    #[arg(long, value_enum, default_value_t = Cache::Plain)]
    cache: Cache,

    /// Leaves the projections of layers as they are
    #[arg(long)]
    unprepared: bool,

    /// Whether a step is put together while the one before runs; on an NVIDIA GPU by default
    #[arg(long)]
    run_ahead: Option<bool>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    Plain,
    Int8,
    Fp8,
}

impl From<Cache> for BlockForm {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Plain => Self::Plain,
            Cache::Int8 => Self::Int8,
            Cache::Fp8 => Self::Fp8,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shape {
    /// 30 layers of 576, 9 heads and 3 of keys
    #[value(name = "smollm2-135m")]
    Smollm2_135m,
    /// 32 layers of 4096, 32 heads and 8 of keys
    #[value(name = "llama-8b")]
    Llama8b,
}

/// What differs between llamas.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    layers: usize,
    dims: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    hidden: i32,
    vocabulary: i32,
}

impl Shape {
    fn sizes(self) -> Sizes {
        let [layers, dims, heads, kv_heads, head_dim, hidden, vocabulary] = match self {
            Self::Smollm2_135m => [30, 576, 9, 3, 64, 1536, 49152],
            Self::Llama8b => [32, 4096, 32, 8, 128, 14336, 128_256],
        };
        let layers = layers as usize;
        Sizes { layers, dims, heads, kv_heads, head_dim, hidden, vocabulary }
    }
}

/// A llama whose head is its table.
struct Llama {
    sizes: Sizes,
    table: TokenEmbedding,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
}

const DTYPE: Dtype = Dtype::Bfloat16;
/// Rounds after a cold one.
const WARM_STREAMS: usize = 4;
const WARM_BATCHES: usize = 2;

impl Llama {
    fn random(sizes: Sizes, bits: Option<i32>, unprepared: bool) -> Result<Self> {
        let Sizes { layers, dims, vocabulary, .. } = sizes;
        let table = random::normal::<f32>(&[vocabulary, dims], None, Some(0.02), None)?;
        let table = table.as_dtype(DTYPE)?;
        let table = match bits {
            Some(bits) => QuantizedEmbedding::from_weight(packed(&table, bits)?)?.into(),
            None => TokenEmbedding::from(nn::Embedding { weight: Param::new(table) }),
        };
        eval(table.parameters().flatten().into_values())?;
        let mut norm = RmsNorm::new(dims)?;
        lower(&mut norm)?;
        let blocks = (0..layers).map(|_| block(sizes, bits, unprepared)).collect::<Result<_>>()?;
        Ok(Self { sizes, table, blocks, norm })
    }
}

fn block(sizes: Sizes, bits: Option<i32>, unprepared: bool) -> Result<DecoderBlock> {
    let Sizes { dims, heads, kv_heads, head_dim, hidden, .. } = sizes;
    let attention = AttentionBuilder::new(dims, heads)
        .num_kv_heads(kv_heads)
        .head_dim(head_dim)
        .rope(Rope::new(head_dim)?)
        .build()?;
    let mut block = DecoderBlock::new(dims, attention, GatedFeedForward::new(dims, hidden)?)?;
    lower(&mut block)?;
    if let Some(bits) = bits {
        let DecoderBlock { attention, feed_forward, .. } = &mut block;
        let Attention { query, key, value, output, .. } = attention;
        let GatedFeedForward { gate, up, down, .. } = feed_forward;
        for projection in [query, key, value, output, gate, up, down] {
            pack(projection, bits)?;
        }
    }
    if !unprepared {
        block.prepare_for_inference()?;
    }
    Ok(block)
}

fn pack(projection: &mut Projection, bits: i32) -> Result<()> {
    if let Projection::Dense(linear) = projection {
        *projection = QuantizedLinear::from_weight(packed(&linear.weight, bits)?)?.into();
    }
    Ok(eval(projection.parameters().flatten().into_values())?)
}

fn packed(matrix: &Array, bits: i32) -> Result<QuantizedWeight> {
    Ok(QuantizedWeight::quantize(matrix, 64, bits)?)
}

/// Rounds all weights, and evaluates them.
fn lower(module: &mut impl ModuleParameters) -> Result<()> {
    for parameter in module.parameters_mut().flatten().into_values() {
        *parameter = parameter.as_dtype(DTYPE)?;
    }
    Ok(eval(module.parameters().flatten().into_values())?)
}

impl CausalModel for Llama {
    fn vocabulary(&self) -> i32 {
        self.sizes.vocabulary
    }

    fn layers(&self) -> Vec<LayerKv> {
        let Sizes { kv_heads: num_kv_heads, head_dim, .. } = self.sizes;
        let layer = LayerKv { num_kv_heads, head_dim, value_dim: None, dtype: DTYPE };
        vec![layer; self.blocks.len()]
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        let mut x = self.table.forward(tokens)?.as_dtype(DTYPE)?;
        for (block, cache) in self.blocks.iter_mut().zip(caches) {
            x = block.forward(AttentionInput { x: &x, mask: None, cache: Some(&mut **cache) })?;
        }
        Ok(x)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        Ok(self.table.as_linear(self.norm.forward(hidden)?)?)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let model = Llama::random(args.shape.sizes(), args.bits, args.unprepared)?;
    let mut options = GenerationEngineOptions {
        max_batch_size: args.batch,
        cache_keys: args.cache.into(),
        cache_values: args.cache.into(),
        share_prefixes: false,
        run_ahead: args.run_ahead,
        ..Default::default()
    };
    options.cache_bytes = options.cache_bytes_for(&model, args.batch.max(2) * 704);
    let engine = GenerationEngine::new(model, options)?;
    println!("{:32} {:>10} {:>12} {:>12}", "", "seconds", "prompt tok/s", "new tok/s");
    one_stream(&engine, "one stream, cold")?;
    for _ in 0..WARM_STREAMS {
        one_stream(&engine, "one stream")?;
    }
    at_once(&engine, "requests at once, cold", args.requests)?;
    for _ in 0..WARM_BATCHES {
        at_once(&engine, "requests at once", args.requests)?;
    }
    Ok(())
}

/// A prompt of 512 tokens and 64 more.
fn one_stream(engine: &GenerationEngine, name: &str) -> Result<()> {
    let start = Instant::now();
    let mut stream = engine.submit(request(1, 512, 64))?;
    stream.next();
    let first = start.elapsed().as_secs_f64();
    let written = stream.completions()[0].tokens.len();
    let seconds = start.elapsed().as_secs_f64();
    let rates = [512.0 / first, written as f64 / (seconds - first)];
    println!("{name:32} {seconds:10.3} {:12.0} {:12.0}", rates[0], rates[1]);
    Ok(())
}

/// Requests as they come, and all tokens that they get over the time that it takes.
fn at_once(engine: &GenerationEngine, name: &str, count: usize) -> Result<()> {
    let before = engine.stats();
    let start = Instant::now();
    let streams = (0..count)
        .map(|n| Ok(engine.submit(request(n, 32 + n * 7919 % 480, 32 + n * 104_729 % 128))?));
    let (mut written, mut read) = (0, 0);
    for (n, stream) in streams.collect::<Result<Vec<_>>>()?.into_iter().enumerate() {
        let text = stream.completions().swap_remove(0);
        ensure!(text.reason == FinishReason::Length, "request {n}: {:?}", text.reason);
        (written, read) = (written + text.tokens.len(), read + 32 + n * 7919 % 480);
    }
    let seconds = start.elapsed().as_secs_f64();
    let (written, read) = (written as f64 / seconds, read as f64 / seconds);
    println!("{name:32} {seconds:10.3} {read:12.0} {written:12.0}");
    let after = engine.stats();
    let time = (after.time - before.time).as_secs_f64();
    let own = (after.scheduling_time - before.scheduling_time).as_secs_f64();
    let steps = after.steps - before.steps;
    println!(
        "{steps} steps of {:.2} ms, {:.1} % of it the engine's own",
        1e3 * time / steps as f64,
        1e2 * own / time
    );
    Ok(())
}

fn request(number: usize, prompt: usize, tokens: usize) -> GenerationRequest {
    let prompt = (0..prompt).map(|place| ((place * 31 + number * 977) % 49_152) as u32);
    let sampling = SamplingParams { temperature: 0.0, ..Default::default() };
    GenerationRequest { sampling, ..GenerationRequest::new(prompt.collect(), tokens) }
}
