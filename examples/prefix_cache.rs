//! Asks several questions about one text, which is read once or for each of them.
//!
//! `cargo run --release --example prefix_cache -- --model model.gguf`
#![allow(clippy::print_stdout, reason = "a command line program prints")]

#[allow(dead_code, reason = "another example uses the rest of it")]
#[path = "generate/llama/mod.rs"]
mod llama;

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::Result;
use clap::Parser;
use mlx_primitives::{
    generation::{GenerationEngine, GenerationEngineOptions, GenerationEvent, GenerationRequest},
    sampling::SamplingParams,
};

use llama::{gguf::Checkpoint, model::Llama, template, tokenizer::Tokenizer};

/// What the questions are about.
const TEXT: &str = "The harbour of Lindevik has two lighthouses. The older one was built of granite in 1791, after a \
    ship with a cargo of salt had run aground in a storm. Its keeper was a woman named Marta Holm, who rang a bell in \
    fog and wrote down every ship that passed. The younger one is of iron, painted in red and white stripes, and was \
    lit for the first time on a morning in May 1902. Since 1964 nobody has lived in either of them: lamps and horns \
    are switched on by a clock, and in summer visitors climb the 142 steps of the older one to look at the sea.";

const QUESTIONS: &[&str] = &[
    "What is the older lighthouse built of?",
    "Who kept the older lighthouse?",
    "What colours does the younger lighthouse have?",
    "How many steps does the older lighthouse have?",
];

/// Asks several questions about one text.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a llama in a GGUF file
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = Arc::new(Tokenizer::new(checkpoint.metadata())?);
    for share_prefixes in [false, true] {
        let options = GenerationEngineOptions {
            share_prefixes,
            detokenizer: Some(tokenizer.clone()),
            ..Default::default()
        };
        let engine = GenerationEngine::new(Llama::load(&checkpoint)?, options)?;
        println!("{}", if share_prefixes { "\nread once" } else { "read for each question" });
        ask(&engine, &checkpoint, &tokenizer)?;
    }
    Ok(())
}

/// One question after another, with the time of each and what was read in all.
fn ask(engine: &GenerationEngine, checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<()> {
    for question in QUESTIONS {
        let prompt = format!("{TEXT} {question}");
        let prompt = template::render(checkpoint.metadata(), tokenizer, &prompt)?;
        let sampling = SamplingParams {
            temperature: 0.0,
            stop_tokens: tokenizer.stops().to_vec(),
            ..Default::default()
        };
        let request = GenerationRequest {
            sampling,
            ..GenerationRequest::new(tokenizer.encode(&prompt)?, 24)
        };
        let start = Instant::now();
        let mut stream = engine.submit(request)?;
        let first = stream.next();
        let waited = start.elapsed().as_secs_f64();
        let rest = stream.completions().swap_remove(0);
        println!("{waited:6.2} s to the first token: {question} {}{}", text_of(first), rest.text);
    }
    let stats = engine.stats();
    println!("{} tokens read, {} found", stats.prompt_tokens, stats.shared_tokens);
    Ok(())
}

fn text_of(event: Option<GenerationEvent>) -> String {
    match event {
        Some(GenerationEvent::Token(token)) => token.text,
        _ => String::new(),
    }
}
