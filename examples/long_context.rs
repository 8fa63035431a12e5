//! Time and memory of attention against the length of the sequence: full, to a sliding window, and in chunks.
//!
//! `cargo run --release --example long_context -- --tokens 16384 --output long_context.svg`
//!
//! Full attention needs memory for all pairs of tokens wherever MLX runs it as plain ops, as on a CPU; a window and
//! chunks do not. By default the sequences are short, and the plot lies in the folder for temporary files.
#![allow(clippy::print_stdout, reason = "a command line program prints")]

use std::{env::temp_dir, ops::Range, path::PathBuf, time::Instant};

use anyhow::Result;
use clap::Parser;
use mlx_primitives::attention::{
    ChunkedCrossAttentionOptions, FlashAttentionOptions, chunked_cross_attention, flash_attention,
    sliding_window_attention,
};
use mlx_rs::{Array, Dtype, memory, random::normal};
use plotters::prelude::*;

/// Measures attention at growing lengths and plots its memory.
#[derive(Debug, Parser)]
struct Args {
    /// The longest sequence; each of the others is half as long as the next
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(i32).range(16..=1 << 20))]
    tokens: i32,
    /// How many tokens a window holds before the one it belongs to
    #[arg(long, default_value_t = 255, value_parser = clap::value_parser!(i32).range(0..))]
    window: i32,
    /// How many keys a chunk has
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(i32).range(1..))]
    chunk: i32,
    /// Heads of queries, keys and values
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(i32).range(1..=128))]
    heads: i32,
    /// Elements of a head
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(i32).range(1..=256))]
    head_dim: i32,
    /// Where the plot goes, as SVG
    #[arg(short, long, value_name = "FILE", default_value_os_t = temp_dir().join("long_context.svg"))]
    output: PathBuf,
}

/// One way to attend.
struct Way {
    name: &'static str,
    attend: fn(&Args, &Array) -> mlx_primitives::Result<Array>,
}

const WAYS: [Way; 3] = [
    Way { name: "full", attend: full },
    Way { name: "in chunks", attend: in_chunks },
    Way { name: "sliding window", attend: in_window },
];

fn full(_: &Args, x: &Array) -> mlx_primitives::Result<Array> {
    flash_attention(x, x, x, FlashAttentionOptions { causal: true, ..Default::default() })
}

fn in_chunks(args: &Args, x: &Array) -> mlx_primitives::Result<Array> {
    let options =
        ChunkedCrossAttentionOptions { chunk_size: args.chunk, causal: true, ..Default::default() };
    chunked_cross_attention(x, x, x, options)
}

fn in_window(args: &Args, x: &Array) -> mlx_primitives::Result<Array> {
    sliding_window_attention(x, x, x, args.window, Default::default())
}

/// What one call took.
#[derive(Debug, Clone, Copy)]
struct Cost {
    tokens: i32,
    milliseconds: f64,
    /// At its peak, beyond the inputs.
    mebibytes: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    println!("{:>8} {:>16} {:>10} {:>10}", "tokens", "attention", "ms", "MiB");
    let mut curves: [Vec<Cost>; 3] = Default::default();
    for tokens in lengths(args.tokens) {
        let x = normal::<f32>(&[1, tokens, args.heads, args.head_dim], None, None, None)?;
        let x = x.as_dtype(Dtype::Float32)?;
        for (way, curve) in WAYS.iter().zip(&mut curves) {
            let cost = measure(way, &args, &x)?;
            println!(
                "{tokens:>8} {:>16} {:>10.1} {:>10.1}",
                way.name, cost.milliseconds, cost.mebibytes
            );
            curve.push(cost);
        }
    }
    plot(&args, &curves)?;
    println!("{}", args.output.display());
    Ok(())
}

/// Up to five lengths, each twice the one before.
fn lengths(longest: i32) -> impl Iterator<Item = i32> {
    (0..5).rev().map(move |halvings| longest >> halvings).filter(|&tokens| tokens > 0)
}

fn measure(way: &Way, args: &Args, x: &Array) -> Result<Cost> {
    // The first call compiles what there is to compile.
    (way.attend)(args, x)?.eval()?;
    memory::clear_cache()?;
    memory::reset_peak_memory()?;
    let (before, start) = (memory::active_memory()?, Instant::now());
    (way.attend)(args, x)?.eval()?;
    let milliseconds = 1e3 * start.elapsed().as_secs_f64();
    let taken = memory::peak_memory()?.saturating_sub(before);
    let mebibytes = taken as f64 / f64::from(1 << 20);
    Ok(Cost { tokens: x.dim(1), milliseconds, mebibytes })
}

fn plot(args: &Args, curves: &[Vec<Cost>; 3]) -> Result<()> {
    let root = SVGBackend::new(&args.output, (720, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let all = curves.iter().flatten();
    let most = all.map(|cost| cost.mebibytes).fold(1.0, f64::max);
    let tokens: Range<f64> = 0.0..f64::from(args.tokens);
    let mut chart = ChartBuilder::on(&root)
        .caption("memory of attention", ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(tokens, 0.0..1.05 * most)?;
    chart.configure_mesh().x_desc("tokens").y_desc("MiB at the peak").draw()?;
    for ((way, curve), color) in WAYS.iter().zip(curves).zip([RED, GREEN, BLUE]) {
        let points = curve.iter().map(|cost| (f64::from(cost.tokens), cost.mebibytes));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(way.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).draw()?;
    root.present()?;
    Ok(())
}
