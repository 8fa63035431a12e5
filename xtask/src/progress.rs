//! What a person sees while waiting: a moving line on a terminal, plain lines elsewhere.
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// One piece of work under way. All goes to stderr: stdout belongs to the programs run.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// Runs `work`, saying `what` is being done and how long it took.
    pub(crate) fn during<T>(
        what: impl Into<String>,
        total: usize,
        work: impl FnOnce(&Progress) -> Result<T>,
    ) -> Result<T> {
        let progress = Progress::start(what.into(), total);
        let result = work(&progress);
        progress.finish(result.is_ok());
        result
    }

    fn start(what: String, total: usize) -> Progress {
        let bar = if stderr().is_terminal() {
            moving(&what, total)
        } else {
            eprintln!("{what} ...");
            ProgressBar::hidden()
        };
        Progress { what, bar, started: Instant::now() }
    }

    /// One of the `total` parts is done.
    pub(crate) fn step(&self) {
        self.bar.inc(1);
    }

    fn finish(self, well: bool) {
        self.bar.finish_and_clear();
        if well {
            eprintln!("{}: {:.1} s", self.what, self.started.elapsed().as_secs_f64());
        }
    }
}

fn moving(what: &str, total: usize) -> ProgressBar {
    let template = match total {
        0 => "{spinner} {msg} ({elapsed})",
        _ => "{spinner} {msg} [{bar:24}] {pos}/{len} ({elapsed})",
    };
    let bar = ProgressBar::new(total as u64);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
