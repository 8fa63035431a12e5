//! The clock, which is Criterion's.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use criterion::{Criterion, SamplingMode};
use mlx_rs::{
    Array,
    error::Exception,
    memory,
    transforms::{async_eval, eval},
};

use super::{case::Run, quiet::Quiet};

/// What a batch of results takes at least, so that its start and the wait for its end, some hundreds
/// of microseconds on a GPU, do not count. The results do not depend on each other: what is measured
/// is how fast calls follow each other, and a GPU may overlap the ends of two.
const SHORTEST_BATCH: Duration = Duration::from_millis(10);
/// So many results of a batch are handed to the device together, and the next are built while it is
/// busy: what the host does counts where it takes longer than the device, as in a model.
const WINDOW: usize = 4;
/// One of this many parts of the memory that MLX would use may be filled by one batch.
const SHARE_OF_MEMORY: usize = 8;
/// Each contender is measured this often, in turn with the others, and the median counts: what
/// the machine does meanwhile strikes all of them.
const ROUNDS: usize = 3;

/// Memory is looked at so often, until it has stopped falling.
const MOST_LOOKS: usize = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// Something to be timed.
pub(super) struct Contender<'a> {
    pub(super) name: &'static str,
    run: &'a mut Run,
    inputs: &'a [Array],
    /// What one call takes beyond its inputs, its results included.
    pub(super) peak_bytes: usize,
    /// How many results are evaluated at once, each for itself.
    batch: usize,
    /// Microseconds a call, one number a round.
    rounds: Vec<f64>,
}

impl<'a> Contender<'a> {
    /// Warms up and settles the size of a batch.
    pub(super) fn new(name: &'static str, run: &'a mut Run, inputs: &'a [Array]) -> Result<Self> {
        let mut contender = Self { name, run, inputs, peak_bytes: 0, batch: 1, rounds: Vec::new() };
        contender.evaluate()?;
        contender.peak_bytes = contender.peak()?;
        contender.settle_batch()?;
        Ok(contender)
    }

    /// The median over the rounds.
    pub(super) fn microseconds(&self) -> f64 {
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn peak(&mut self) -> Result<usize> {
        let before = settled_memory()?;
        // MLX counts no peak where it takes what it has kept.
        memory::clear_cache()?;
        memory::reset_peak_memory()?;
        self.evaluate()?;
        Ok(memory::peak_memory()?.saturating_sub(before))
    }

    fn settle_batch(&mut self) -> Result<()> {
        let room = memory::memory_limit()? / SHARE_OF_MEMORY;
        let most = (room / self.peak_bytes.max(1)).clamp(1, 1000);
        loop {
            // Whatever is larger than before has to be allocated, once.
            self.evaluate()?;
            let took = self.evaluate()?.min(self.evaluate()?).max(Duration::from_nanos(1));
            if took >= SHORTEST_BATCH || self.batch == most {
                return Ok(());
            }
            let needed = SHORTEST_BATCH.as_secs_f64() / took.as_secs_f64() * self.batch as f64;
            // A little more than needed, so as not to fall short by a hair for ever.
            self.batch = ((needed * 1.1) as usize + 1).min(most);
        }
    }

    /// Builds a batch of results and waits for all of them; what they hold is freed off the clock.
    fn evaluate(&mut self) -> Result<Duration, Exception> {
        let mut results = Vec::new();
        let started = Instant::now();
        let mut handed = 0;
        for call in 1..=self.batch {
            results.extend((self.run)(self.inputs)?);
            if call % WINDOW == 0 {
                async_eval(&results[handed..])?;
                handed = results.len();
            }
        }
        eval(&results)?;
        Ok(started.elapsed())
    }

    /// Measures one round in `dir`, an empty folder.
    fn measure(&mut self, dir: &Path) -> Result<()> {
        let mut failure = None;
        let quiet = Quiet::new(dir.join("log"))?;
        let mut criterion = criterion(dir);
        let mut group = criterion.benchmark_group("round");
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function("contender", |bencher| {
            bencher.iter_custom(|batches| {
                let times = (0..batches).map(|_| self.evaluate());
                times.sum::<Result<_, _>>().unwrap_or_else(|error| {
                    failure = Some(error);
                    // Criterion accepts no failure, and no time of zero.
                    Duration::from_secs(1)
                })
            });
        });
        group.finish();
        drop(quiet);
        match failure {
            Some(error) => Err(error.into()),
            None => {
                self.rounds.push(median_ns(dir)? / 1e3 / self.batch as f64);
                Ok(())
            }
        }
    }
}

/// What is held, once MLX has let go of what a GPU has finished with: it does so on a thread of its own, a little later.
fn settled_memory() -> Result<usize, Exception> {
    let mut held = memory::active_memory()?;
    for _ in 0..MOST_LOOKS {
        thread::sleep(BETWEEN_LOOKS);
        let now = memory::active_memory()?;
        if now == held {
            break;
        }
        held = now;
    }
    Ok(held)
}

fn criterion(dir: &Path) -> Criterion {
    Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(20))
        .measurement_time(Duration::from_millis(100))
        // Only the median is read, not how sure Criterion is of it.
        .nresamples(100)
        .output_directory(dir)
}

/// The median that Criterion left in `dir`.
fn median_ns(dir: &Path) -> Result<f64> {
    let file = dir.join("round/contender/new/estimates.json");
    let text = fs::read_to_string(&file).context("Criterion left no estimates")?;
    let estimates: serde_json::Value = serde_json::from_str(&text)?;
    estimates["median"]["point_estimate"].as_f64().context("Criterion estimated no median")
}

/// Measures all contenders in turn, each round beginning with another one.
pub(super) fn measure_in_turn(contenders: &mut [Contender<'_>]) -> Result<()> {
    let count = contenders.len();
    for round in 0..ROUNDS {
        for place in 0..count {
            let dir = tempfile::tempdir()?;
            contenders[(round + place) % count].measure(dir.path())?;
        }
    }
    Ok(())
}
