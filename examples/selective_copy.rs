//! Trains a small Mamba to copy: a few letters stand among blanks, anywhere, and are asked for at the end.
//!
//! Which step to remember depends on what stands there, so no fixed convolution can do it (Gu and Dao,
//! [Mamba](https://arxiv.org/abs/2312.00752), 2023, section 3.1). Prints the loss, plots it, and then lets the model answer
//! step by step from its state. `cargo run --release --example selective_copy` takes about a minute on two cores.
#![allow(clippy::print_stdout, reason = "a command line program prints")]

use std::{env::temp_dir, path::PathBuf, time::Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use mlx_primitives::ssm::{Mamba, MambaBuilder};
use mlx_rs::{
    Array,
    builder::Builder,
    error::Exception,
    losses::{CrossEntropyBuilder, LossReduction},
    module::{Module, ModuleParameters},
    nn,
    ops::{
        argsort_axis, concatenate, full,
        indexing::{IndexOp, argmax_axis},
        sort_axis, zeros,
    },
    optimizers::{Adam, Optimizer},
    random,
    transforms::eval_params,
};
use plotters::prelude::*;

/// Trains a small Mamba on selective copying
#[derive(Debug, Parser)]
struct Args {
    /// Steps of training
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Tokens of a sequence before the answer
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(i32).range(1..=4096))]
    length: i32,
    /// Letters to copy
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(i32).range(1..=64))]
    letters: i32,
    /// Sequences of a step
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(i32).range(1..=4096))]
    batch: i32,
    /// Where the plot goes, as SVG
    #[arg(short, long, value_name = "FILE", default_value_os_t = temp_dir().join("selective_copy.svg"))]
    output: PathBuf,
}

const BLANK: i32 = 0;
const ASK: i32 = 1;
/// The letters follow the two tokens that are none.
const ALPHABET: i32 = 8;

/// Of learning, at the beginning.
const RATE: f32 = 4e-3;

/// Sequences, `[B, length + letters]`, whose last tokens ask, and the letters in them, `[B, letters]`.
fn examples(args: &Args) -> Result<(Array, Array), Exception> {
    let Args { batch, length, letters, .. } = *args;
    let answers = random::randint::<_, i32>(ASK + 1, ASK + 1 + ALPHABET, &[batch, letters], None)?;
    // The first of a random order of all places.
    let order = argsort_axis(random::uniform::<_, f32>(0.0, 1.0, &[batch, length], None)?, 1)?;
    let places = sort_axis(order.index((.., ..letters)), 1)?;
    let blank = zeros::<i32>(&[batch, length])?;
    let context = blank.put_along_axis(places, &answers, 1)?;
    let asking = full::<i32>(&[batch, letters], Array::from_int(ASK))?;
    Ok((concatenate(&[context, asking], 1)?, answers))
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.letters <= args.length, "there must be a place for each letter");
    random::seed(1)?;
    let vocabulary = ASK + 1 + ALPHABET;
    let mut model = MambaBuilder::new(32, 2).d_state(8).vocab_size(vocabulary).build()?;
    let losses = train(&mut model, &args)?;
    plot(&args, &losses)?;
    println!("{}", args.output.display());
    answer(&mut model, &args)
}

fn train(model: &mut Mamba, args: &Args) -> Result<Vec<f32>> {
    let loss = CrossEntropyBuilder::new().reduction(LossReduction::Mean).build()?;
    let letters = args.letters;
    let loss = move |model: &mut Mamba, (x, y): (&Array, &Array)| -> Result<Array, Exception> {
        let logits = model.forward(x)?;
        loss.apply(logits.index((.., -letters.., ..)), y)
    };
    let mut step = nn::value_and_grad(loss);
    let mut optimizer = Adam::new(RATE);
    let (start, mut losses) = (Instant::now(), Vec::new());
    for count in 1..=args.steps {
        // Down to nothing, so that the noise of small batches settles.
        let rest = 1.0 - (count - 1) as f32 / args.steps as f32;
        optimizer.lr = Array::from_f32(RATE * rest);
        let (x, y) = examples(args)?;
        let (loss, gradients) = step(model, (&x, &y))?;
        optimizer.update(model, gradients)?;
        eval_params(model.parameters())?;
        losses.push(loss.item_exact::<f32>());
        if count % 50 == 0 || count == 1 {
            let seconds = start.elapsed().as_secs_f32();
            println!("step {count:>4}   loss {:.4}   {seconds:.1} s", losses[losses.len() - 1]);
        }
    }
    Ok(losses)
}

/// Reads new sequences at once, then answers one letter for each step.
fn answer(model: &mut Mamba, args: &Args) -> Result<()> {
    let (x, expected) = examples(args)?;
    let mut states = model.states();
    model.forward_with(x.index((.., ..args.length)), &mut states)?;
    let mut answers = Vec::new();
    for t in args.length..args.length + args.letters {
        let logits = model.step(x.index((.., t)), &mut states)?;
        answers.push(argmax_axis(logits, -1, true)?);
    }
    let answers = concatenate(&answers, 1)?.as_type::<i32>()?;
    let right = answers.eq(&expected)?.as_type::<f32>()?.mean(None)?.item_exact::<f32>();
    println!("read     {}", written(&x.index((0, ..args.length))));
    println!("answered {}", written(&answers.index(0)));
    println!("{:.1} % of {} letters are right", 100.0 * right, expected.size());
    Ok(())
}

fn written(tokens: &Array) -> String {
    let letter = |token: i32| match token {
        BLANK => '.',
        ASK => '?',
        token => char::from(b'a' + (token - ASK - 1) as u8),
    };
    (0..tokens.dim(0)).map(|i| letter(tokens.index(i).item_exact())).collect()
}

fn plot(args: &Args, losses: &[f32]) -> Result<()> {
    let root = SVGBackend::new(&args.output, (720, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = losses.iter().copied().fold(0.1, f32::max);
    let mut chart = ChartBuilder::on(&root)
        .caption("selective copying", ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(1..losses.len().max(2), 0.0..1.05 * most)?;
    chart.configure_mesh().x_desc("step").y_desc("cross entropy").draw()?;
    chart.draw_series(LineSeries::new((1..).zip(losses.iter().copied()), BLUE.stroke_width(2)))?;
    root.present()?;
    Ok(())
}
