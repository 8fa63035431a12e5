//! Answers a file of prompts at once: JSON lines out, a bar of what is done, and a table at the end.
//!
//! `cargo run --release --example serve_batch -- --model model.gguf --prompts prompts.txt > answers.jsonl`
#![allow(clippy::print_stderr, reason = "a command line program prints")]

#[allow(dead_code, reason = "another example uses the rest of it")]
#[path = "generate/llama/mod.rs"]
mod llama;

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use mlx_primitives::{
    generation::{
        Completion, EngineStats, FinishReason, GenerationEngine, GenerationEngineOptions,
        GenerationRequest, GenerationStream,
    },
    sampling::SamplingParams,
};
use serde::Serialize;

use llama::{
    gguf::{Checkpoint, Metadata},
    model::Llama,
    template,
    tokenizer::Tokenizer,
};

/// Answers a file of prompts at once.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a llama in a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// A prompt a line
    #[arg(long, value_name = "PATH")]
    prompts: PathBuf,

    /// Stop each answer after this many tokens
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,

    /// How many answers are written at once
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,

    /// What keys and values may take
    #[arg(long, value_name = "MiB", default_value_t = 1024)]
    cache: usize,

    /// Spread of the random choice; 0 always takes the likeliest token
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    temperature: f32,

    /// Start of the random choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// A line of output.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    prompt: &'a str,
    text: &'a str,
    tokens: usize,
    reason: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.model)?;
    let metadata = checkpoint.metadata();
    let tokenizer = Arc::new(Tokenizer::new(metadata)?);
    let prompts = read(&args.prompts)?;
    let requests = prompts.iter().map(|prompt| request(&args, metadata, &tokenizer, prompt));
    let requests = requests.collect::<Result<Vec<_>>>()?;

    let engine = engine(&args, Llama::load(&checkpoint)?, tokenizer)?;
    let start = Instant::now();
    let streams = requests.into_iter().map(|request| Ok(engine.submit(request)?));
    let answers = wait(streams.collect::<Result<Vec<_>>>()?, &prompts)?;
    report(&answers, engine.stats(), start.elapsed());
    Ok(())
}

/// The lines of a file that say something.
fn read(path: &PathBuf) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let prompts = lines.map(str::to_owned).collect::<Vec<_>>();
    ensure!(!prompts.is_empty(), "{}: no prompt", path.display());
    Ok(prompts)
}

fn request(
    args: &Args,
    metadata: &Metadata,
    tokenizer: &Tokenizer,
    prompt: &str,
) -> Result<GenerationRequest> {
    let prompt = tokenizer.encode(&template::render(metadata, tokenizer, prompt)?)?;
    let sampling = SamplingParams {
        seed: args.seed,
        temperature: args.temperature,
        stop_tokens: tokenizer.stops().to_vec(),
        ..Default::default()
    };
    Ok(GenerationRequest { sampling, ..GenerationRequest::new(prompt, args.max_tokens) })
}

fn engine(args: &Args, model: Llama, tokenizer: Arc<Tokenizer>) -> Result<GenerationEngine> {
    let options = GenerationEngineOptions {
        max_batch_size: args.batch,
        cache_bytes: args.cache << 20,
        detokenizer: Some(tokenizer),
        ..Default::default()
    };
    Ok(GenerationEngine::new(model, options)?)
}

/// Prints each answer as soon as it is whole and those before it are.
fn wait(streams: Vec<GenerationStream>, prompts: &[String]) -> Result<Vec<Completion>> {
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} answers · {elapsed}")?;
    let bar = ProgressBar::new(streams.len() as u64).with_style(style);
    let mut output = io::stdout().lock();
    let mut answers = Vec::new();
    for (stream, prompt) in streams.into_iter().zip(prompts) {
        for answer in stream.completions() {
            let reason = reason(&answer.reason);
            let (text, tokens) = (answer.text.as_str(), answer.tokens.len());
            serde_json::to_writer(&mut output, &Answer { prompt, text, tokens, reason })?;
            writeln!(output)?;
            answers.push(answer);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(answers)
}

fn reason(reason: &FinishReason) -> String {
    match reason {
        FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Complete => {
            "stop".to_owned()
        }
        FinishReason::Length => "length".to_owned(),
        FinishReason::Failed(why) => format!("failed: {why}"),
        _ => "cancelled".to_owned(),
    }
}

fn report(answers: &[Completion], stats: EngineStats, time: Duration) {
    let written: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    let seconds = time.as_secs_f64();
    let share = stats.scheduling_time.as_secs_f64() / stats.time.as_secs_f64().max(1e-9);
    let rows = [
        ("answers", format!("{} in {seconds:.1} s", answers.len())),
        ("tokens written", format!("{written}, {:.1} a second", written as f64 / seconds)),
        ("tokens of prompts read", stats.prompt_tokens.to_string()),
        ("tokens found in prefixes", stats.shared_tokens.to_string()),
        ("steps", stats.steps.to_string()),
        ("the engine's own time", format!("{:.1} % of the steps'", 100.0 * share)),
        ("times a text had to wait", stats.preemptions.to_string()),
    ];
    for (name, value) in rows {
        eprintln!("{name:26} {value}");
    }
}
