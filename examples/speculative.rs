//! Writes one text with and without guesses of how it goes on: the same text in fewer steps, but for how a device rounds.
//!
//! `cargo run --release --example speculative -- --model model.gguf [--draft-model smaller.gguf]`
#![allow(clippy::print_stdout, reason = "a command line program prints")]

#[allow(dead_code, reason = "another example uses the rest of it")]
#[path = "generate/llama/mod.rs"]
mod llama;

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::Result;
use clap::Parser;
use mlx_primitives::{
    generation::{
        DraftModel, DraftModelOptions, GenerationEngine, GenerationEngineOptions,
        GenerationRequest, PromptLookup,
    },
    sampling::SamplingParams,
};

use llama::{gguf::Checkpoint, model::Llama, template, tokenizer::Tokenizer};

/// A text that quotes.
const PROMPT: &str = "Repeat this text word for word: The harbour of Lindevik has two lighthouses. The older one was \
    built of granite in 1791, after a ship with a cargo of salt had run aground in a storm. The younger one is of iron, \
    painted in red and white stripes, and was lit for the first time on a morning in May 1902.";

/// Writes one text with and without guesses of how it goes on.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a llama in a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// A smaller llama of the same vocabulary, to guess by
    #[arg(long, value_name = "PATH")]
    draft_model: Option<PathBuf>,

    /// What to ask
    #[arg(long, value_name = "TEXT", default_value = PROMPT)]
    prompt: String,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 96)]
    max_tokens: usize,

    /// How many tokens are guessed at most
    #[arg(long, value_name = "N", default_value_t = 6)]
    max_draft_tokens: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Arc::new(Tokenizer::new(checkpoint.metadata())?);
    let options = || GenerationEngineOptions {
        max_draft_tokens: args.max_draft_tokens,
        detokenizer: Some(tokenizer.clone()),
        ..Default::default()
    };
    let request = request(&args, &checkpoint, &tokenizer)?;
    let model = || Llama::load(&checkpoint);
    println!("{:16} {:>8} {:>8} {:>14} {:>8}", "", "seconds", "tokens", "tokens a step", "kept");
    let plain = GenerationEngine::new(model()?, options())?;
    let text = write(&plain, "no guesses", &request)?;
    drop(plain);
    let lookup = GenerationEngine::with_drafter(model()?, PromptLookup::default(), options())?;
    compare(&write(&lookup, "prompt lookup", &request)?, &text);
    drop(lookup);
    if let Some(path) = &args.draft_model {
        let draft = Llama::load(&Checkpoint::open(path)?)?;
        let draft = DraftModel::new(draft, DraftModelOptions::default())?;
        let drafted = GenerationEngine::with_drafter(model()?, draft, options())?;
        compare(&write(&drafted, "draft model", &request)?, &text);
    }
    println!("\n{text}");
    Ok(())
}

fn request(
    args: &Args,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> Result<GenerationRequest> {
    let prompt = template::render(checkpoint.metadata(), tokenizer, &args.prompt)?;
    let sampling = SamplingParams {
        temperature: 0.0,
        stop_tokens: tokenizer.stops().to_vec(),
        ..Default::default()
    };
    let prompt = tokenizer.encode(&prompt)?;
    Ok(GenerationRequest { sampling, ..GenerationRequest::new(prompt, args.max_tokens) })
}

fn compare(guessed: &str, plain: &str) {
    if guessed != plain {
        println!("the text is another one:\n{guessed}");
    }
}

/// Writes the text twice, for the first time is not like others, and tells of the second.
fn write(engine: &GenerationEngine, name: &str, request: &GenerationRequest) -> Result<String> {
    engine.generate(request.clone())?;
    let (before, start) = (engine.stats(), Instant::now());
    let text = engine.generate(request.clone())?.swap_remove(0).text;
    let (after, seconds) = (engine.stats(), start.elapsed().as_secs_f64());
    let [tokens, steps, drafted, accepted] = [
        after.generated_tokens - before.generated_tokens,
        after.steps - before.steps,
        after.drafted_tokens - before.drafted_tokens,
        after.accepted_tokens - before.accepted_tokens,
    ];
    let kept = if drafted == 0 { 0.0 } else { 1e2 * accepted as f64 / drafted as f64 };
    let a_step = tokens as f64 / steps as f64;
    println!("{name:16} {seconds:8.2} {tokens:8} {a_step:14.2} {kept:6.0} %");
    Ok(text)
}
