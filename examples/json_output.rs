//! Answers a prompt in JSON of a schema: whatever the model would rather say, the answer can be parsed.
//!
//! `cargo run --release --features llguidance --example json_output -- --model model.gguf --prompt "..." --json-schema schema.json`
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a command line program prints")]

#[allow(dead_code, reason = "another example uses the rest of it")]
#[path = "generate/llama/mod.rs"]
mod llama;

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Parser;
use mlx_primitives::{
    generation::{
        CausalModel, Constraint, GenerationEngine, GenerationEngineOptions, GenerationRequest,
        Grammar, Grammars,
    },
    sampling::SamplingParams,
};

use llama::{gguf::Checkpoint, model::Llama, template, tokenizer::Tokenizer};

/// What is asked for where no file is given.
const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "name": { "type": "string", "maxLength": 30 },
        "population": { "type": "integer", "minimum": 0, "maximum": 100000000 },
        "climate": { "enum": ["cold", "temperate", "hot"] },
        "sights": { "type": "array", "items": { "type": "string", "maxLength": 30 }, "minItems": 2, "maxItems": 3 }
    },
    "required": ["name", "population", "climate", "sights"],
    "additionalProperties": false
}"#;

/// Answers a prompt in JSON of a schema.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a llama in a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// What to ask
    #[arg(long, value_name = "TEXT", default_value = "Describe the city of Paris as JSON.")]
    prompt: String,

    /// The JSON schema of the answer [default: one of a city]
    #[arg(long, value_name = "PATH")]
    json_schema: Option<PathBuf>,

    /// Stop each answer after this many tokens
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,

    /// How many answers to write
    #[arg(short, default_value_t = 3)]
    n: u32,

    /// Spread of the random choice; 0 always takes the likeliest token
    #[arg(long, value_name = "F", default_value_t = 0.7)]
    temperature: f32,

    /// Start of the random choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Arc::new(Tokenizer::new(checkpoint.metadata())?);
    let prompt = template::render(checkpoint.metadata(), &tokenizer, &args.prompt)?;
    let prompt = tokenizer.encode(&prompt)?;
    let model = Llama::load(&checkpoint)?;
    let grammar = grammar(&args, &tokenizer, model.vocabulary())?;

    let options = GenerationEngineOptions {
        detokenizer: Some(tokenizer),
        cache_bytes: 256 << 20,
        ..Default::default()
    };
    let engine = GenerationEngine::new(model, options)?;
    let sampling =
        SamplingParams { seed: args.seed, temperature: args.temperature, ..Default::default() };
    let request = GenerationRequest {
        n: args.n,
        sampling,
        constraint: Some(Arc::new(grammar)),
        ..GenerationRequest::new(prompt, args.max_tokens)
    };
    let (answers, time) = timed(|| engine.generate(request));
    for answer in answers? {
        println!("{}", answer.text);
        eprintln!("  {:?} after {} tokens", answer.reason, answer.tokens.len());
    }
    eprintln!("{} steps in {:.2} s", engine.stats().steps, time.as_secs_f64());
    Ok(())
}

/// The constraint, and on the way how long it takes to make and to ask.
fn grammar(args: &Args, tokenizer: &Tokenizer, vocabulary: i32) -> Result<Grammar> {
    let schema = match &args.json_schema {
        Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => SCHEMA.to_owned(),
    };
    let bytes = |token: u32| tokenizer.bytes(token).to_vec();
    let (grammars, all) = timed(|| Grammars::new(&bytes, vocabulary, tokenizer.stops()));
    let grammars = grammars?;
    let (grammar, one) = timed(|| grammars.json_schema(&schema));
    let mut grammar = grammar?;
    let (mask, first) = timed(|| grammar.allowed());
    mask.map_err(anyhow::Error::from_boxed)?;
    let ms = [all, one, first].map(|time| 1e3 * time.as_secs_f64());
    eprintln!("vocabulary {:.0} ms, schema {:.1} ms, first mask {:.2} ms", ms[0], ms[1], ms[2]);
    Ok(grammar)
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}
