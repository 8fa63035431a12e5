//! Writes text with a llama from a GGUF file.
//!
//! `cargo run --release --example generate -- --model model.gguf --prompt "Why is the sky blue?"`
#![allow(clippy::print_stderr, reason = "a command line program prints")]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking"))]

mod args;
mod device;
mod generate;
mod llama;
mod report;

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mlx_primitives::{
    generation::{GenerationEngine, GenerationEngineOptions, GenerationRequest},
    sampling::SamplingParams,
};

use args::Args;
use generate::generate;
use llama::{
    gguf::{Checkpoint, Metadata},
    model::Llama,
    template,
    tokenizer::Tokenizer,
};
use report::Report;

fn main() -> ExitCode {
    let args = Args::try_parse().unwrap_or_else(|error| refuse(&error));
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Prints what was asked for, or what is wrong with the flags: clap's usage and hints left out.
fn refuse(error: &clap::Error) -> ! {
    if error.use_stderr() {
        eprintln!("{}", refusal(&error.to_string()));
        std::process::exit(error.exit_code());
    }
    error.exit()
}

/// The first paragraph of clap's message, in one line.
fn refusal(message: &str) -> String {
    let paragraph = message.lines().take_while(|line| !line.is_empty());
    paragraph.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

fn run(args: &Args) -> Result<()> {
    let device = device::select(args.device)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let metadata = checkpoint.metadata();
    let tokenizer = Tokenizer::new(metadata).with_context(|| args.model.display().to_string())?;
    let prompt = prompt_tokens(args, metadata, &tokenizer)?;
    let context = checkpoint.config().context_length;
    let max_tokens = room(prompt.len(), args.max_tokens as usize, context)?;
    let sampling = sampling(args, tokenizer.stops());
    let request =
        GenerationRequest { sampling, ..GenerationRequest::new(prompt.clone(), max_tokens) };

    let model = Llama::load(&checkpoint)?;
    let options = GenerationEngineOptions {
        cache_bytes: GenerationEngineOptions::default()
            .cache_bytes_for(&model, prompt.len() + max_tokens),
        detokenizer: Some(Arc::new(tokenizer)),
        ..Default::default()
    };
    let engine = GenerationEngine::new(model, options)?;
    let (mut text, mut output) = (String::new(), text_output(args.json));
    let emit = |piece: &str| {
        text.push_str(piece);
        output.write_all(piece.as_bytes())?;
        Ok(output.flush()?)
    };
    let generation = generate(&engine, request, emit)?;
    print_report(&Report::new(prompt, generation, text, device), args.json)
}

fn sampling(args: &Args, stops: &[u32]) -> SamplingParams {
    SamplingParams {
        seed: args.seed,
        temperature: args.temperature,
        top_k: i32::try_from(args.top_k).unwrap_or(i32::MAX),
        top_p: args.top_p,
        min_p: args.min_p,
        stop_tokens: stops.to_vec(),
        ..Default::default()
    }
}

fn prompt_tokens(args: &Args, metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let tokens = if args.raw {
        let text = tokenizer.encode(&args.prompt)?;
        tokenizer.lead().into_iter().chain(text).collect()
    } else {
        // The template writes the leading token itself.
        tokenizer.encode(&template::render(metadata, tokenizer, &args.prompt)?)?
    };
    ensure!(!tokens.is_empty(), "the prompt is empty: there is nothing to continue");
    Ok(tokens)
}

/// How many tokens may be written: the last one needs no place in the context.
fn room(prompt: usize, max_tokens: usize, context: usize) -> Result<usize> {
    ensure!(
        prompt <= context,
        "the prompt has {prompt} tokens, but the model's context holds {context}",
    );
    Ok(max_tokens.min(context - prompt + 1))
}

/// With --json the text is a field of the object, and standard output is the object alone.
fn text_output(json: bool) -> Box<dyn Write> {
    if json { Box::new(io::sink()) } else { Box::new(io::stdout()) }
}

fn print_report(report: &Report, json: bool) -> Result<()> {
    let last_line = if json { report.json()? } else { String::new() };
    writeln!(io::stdout(), "{last_line}")?;
    eprintln!("{}", report.closing_line());
    Ok(())
}

fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{Args, one_line, prompt_tokens, refusal, room};
    use crate::llama::{
        gguf::{
            Checkpoint,
            synthetic::{self, File, flag, text},
        },
        testing::{fixtures, model_path},
        tokenizer::Tokenizer,
    };

    fn prompt(file: &File, flags: &[&str]) -> Result<Vec<u32>, String> {
        let metadata = file.metadata();
        let tokenizer = Tokenizer::new(&metadata).unwrap();
        let args = ["generate", "--model", "m.gguf"].iter().chain(flags);
        let args = Args::try_parse_from(args).unwrap();
        prompt_tokens(&args, &metadata, &tokenizer).map_err(|error| one_line(&error))
    }

    #[test]
    fn raw_prompts_get_the_lead_and_chats_the_template() {
        let mut file = synthetic::tokenizer();
        let template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}";
        file.set("tokenizer.chat_template", text(template));
        file.set("tokenizer.ggml.add_bos_token", flag(true));
        assert_eq!(prompt(&file, &["--prompt", "ab", "--raw"]), Ok(vec![7, 2]));
        assert_eq!(prompt(&file, &["--prompt", "ab"]), Ok(vec![7, 2, 8]));
        assert_eq!(prompt(&file, &["--prompt", ""]), Ok(vec![7, 8]));
    }

    #[test]
    fn real_prompts_become_the_tokens_of_the_fixture() {
        let Some(path) = model_path() else { return };
        let checkpoint = Checkpoint::open(&path).unwrap();
        let tokenizer = Tokenizer::new(checkpoint.metadata()).unwrap();
        for case in fixtures() {
            let flags = ["generate", "--model", "m.gguf", "--prompt", &case.prompt];
            let args = flags.into_iter().chain(case.raw.then_some("--raw"));
            let args = Args::try_parse_from(args).unwrap();
            let tokens = prompt_tokens(&args, checkpoint.metadata(), &tokenizer).unwrap();
            assert_eq!(tokens, case.prompt_tokens, "{:?}", case.prompt);
        }
    }

    #[test]
    fn there_must_be_something_to_continue() {
        let mut file = synthetic::tokenizer();
        let empty = prompt(&file, &["--prompt", "", "--raw"]);
        assert_eq!(empty.unwrap_err(), "the prompt is empty: there is nothing to continue");
        file.set("tokenizer.ggml.add_bos_token", flag(true));
        assert_eq!(prompt(&file, &["--prompt", "", "--raw"]), Ok(vec![7]));
    }

    #[test]
    fn the_context_bounds_prompt_and_text() {
        assert_eq!(room(10, 5, 16).unwrap(), 5);
        assert_eq!(room(10, 128, 16).unwrap(), 7);
        assert_eq!(room(16, 128, 16).unwrap(), 1);
        let error = room(17, 1, 16).unwrap_err().to_string();
        assert_eq!(error, "the prompt has 17 tokens, but the model's context holds 16");
    }

    #[test]
    fn a_refused_command_line_is_one_line() {
        let error = Args::try_parse_from(["generate"]).unwrap_err();
        assert_eq!(
            refusal(&error.to_string()),
            "error: the following required arguments were not provided: --model <PATH> --prompt <TEXT>",
        );
        let flags = ["generate", "--model", "m", "--prompt", "hi", "--top-p", "2"];
        assert_eq!(
            refusal(&Args::try_parse_from(flags).unwrap_err().to_string()),
            "error: invalid value '2' for '--top-p <F>': must be a number above 0 and at most 1",
        );
    }

    #[test]
    fn errors_are_one_line() {
        let error = anyhow::anyhow!("inner\n  lines").context("outer");
        assert_eq!(one_line(&error), "outer: inner lines");
    }
}
