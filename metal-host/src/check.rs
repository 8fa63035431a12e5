//! The ladder: everything that is tried on one kernel.

use std::time::Duration;

use crate::{
    error::{Error, Kind, Result},
    host::{Host, Prepared},
    launch::{Build, Launch, Run},
    report,
    source::Source,
};

/// How [`Host::check`] goes about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// What the kernel is compiled with; the first is run under every schedule and with every poison.
    pub builds: Vec<Build>,
    /// What MLX fills the outputs with, its `init_value`.
    pub init_value: Option<f32>,
    /// Whether the compiler may fuse `a * b + c`.
    pub fast_contract: bool,
    /// The schedules whose outputs must be equal; the first is the one that the other builds run under.
    pub schedules: Vec<u64>,
    /// The poisons whose outputs must be equal; the first likewise.
    pub poisons: Vec<u8>,
    /// How long each run may take.
    pub time_limit: Duration,
}

impl Default for Check {
    fn default() -> Self {
        let run = Run::default();
        Check {
            builds: Build::ALL.to_vec(),
            init_value: run.init_value,
            fast_contract: run.fast_contract,
            schedules: vec![0, 1, 7],
            poisons: vec![0xff, 0x5a],
            time_limit: run.time_limit,
        }
    }
}

/// ThreadSanitizer tells apart so many threads at most, itself included.
const SANITIZER_THREADS: u64 = 224;

impl Host {
    /// Runs the kernel in every way that may show a mistake, and returns what [`Host::run`] does.
    ///
    /// First in the first build, which by default has no sanitizers, under every schedule and with every poison: the
    /// outputs must be equal bit for bit, but for float outputs that are added to atomically, whose sums may differ
    /// with the schedule. Then once in each other build. Of runs that differ, or crash, a sanitizer may say which line
    /// it is: its finding is preferred.
    ///
    /// # Errors
    /// As [`Host::run`]; the first finding.
    pub fn check(
        &self,
        source: &Source,
        launch: Launch,
        inputs: &[&[u8]],
        check: &Check,
    ) -> Result<Vec<Vec<u8>>> {
        let ladder = Ladder { kernel: self.prepare(source, launch, inputs)?, check };
        let ordered = ladder.ordered();
        let may_be_told_better =
            |error: &Error| error.finding().is_some_and(|it| is_vague(it.kind));
        if ordered.as_ref().is_err_and(|error| !may_be_told_better(error)) {
            return ordered;
        }
        ladder.others()?;
        ordered
    }
}

/// Whether a sanitizer may know the line.
fn is_vague(kind: Kind) -> bool {
    use Kind::{Crash, PoisonDependent, ScheduleDependent, Unwritten};
    matches!(kind, Crash | PoisonDependent | ScheduleDependent | Unwritten)
}

struct Ladder<'a> {
    kernel: Prepared<'a>,
    check: &'a Check,
}

impl Ladder<'_> {
    fn run(&self, build: Build, schedule: u64, poison: u8) -> Run {
        let Check { init_value, fast_contract, time_limit, .. } = *self.check;
        Run { build, schedule, poison, init_value, fast_contract, time_limit }
    }

    fn first(&self) -> (Build, u64, u8) {
        let build = self.check.builds.first().copied().unwrap_or(Build::Plain);
        let schedule = self.check.schedules.first().copied().unwrap_or(0);
        (build, schedule, self.check.poisons.first().copied().unwrap_or(0xff))
    }

    /// Every poison with the first schedule, then every schedule with the first poison.
    fn ordered(&self) -> Result<Vec<Vec<u8>>> {
        let (build, schedule, poison) = self.first();
        let outputs = self.kernel.run(self.run(build, schedule, poison))?;
        for &other in self.check.poisons.iter().skip(1) {
            let run = self.run(build, schedule, other);
            let others = self.kernel.run(run)?;
            self.compare(&run, &outputs, &others, Kind::PoisonDependent)?;
        }
        for &other in self.check.schedules.iter().skip(1) {
            let run = self.run(build, other, poison);
            let others = self.kernel.run(run)?;
            self.compare(&run, &outputs, &others, Kind::ScheduleDependent)?;
        }
        Ok(outputs)
    }

    fn others(&self) -> Result<()> {
        let (_, schedule, poison) = self.first();
        for &build in self.check.builds.iter().skip(1) {
            self.kernel.run(self.run(build, schedule, poison))?;
        }
        // A larger group than that loses reports in order; random orders bring them back.
        if self.check.builds.contains(&Build::Thread)
            && self.kernel.launch.group_threads() > SANITIZER_THREADS
        {
            for schedule in [11, 12] {
                self.kernel.run(self.run(Build::Thread, schedule, poison))?;
            }
        }
        Ok(())
    }

    fn compare(&self, run: &Run, first: &[Vec<u8>], other: &[Vec<u8>], kind: Kind) -> Result<()> {
        let source = self.kernel.source;
        let (_, schedule, poison) = self.first();
        for (output, (first, other)) in source.returned().zip(first.iter().zip(other)) {
            let adds_floats = source.atomic_outputs && output.element.is_float();
            if kind == Kind::ScheduleDependent && adds_floats {
                continue;
            }
            let Some(byte) = first.iter().zip(other).position(|(a, b)| a != b) else { continue };
            let size = output.element.bytes();
            let (element, start) = (byte / size, byte / size * size);
            let value =
                |bytes: &[u8], poison: u8| bytes[start..start + size].iter().all(|&b| b == poison);
            let unwritten =
                kind == Kind::PoisonDependent && value(first, poison) && value(other, run.poison);
            let kind = if unwritten { Kind::Unwritten } else { kind };
            let shown = |bytes: &[u8]| format!("{:02x?}", &bytes[start..start + size]);
            let message = format!(
                "element {element} of `{}` is {} here and {} under schedule {schedule} with poison {poison:#04x}",
                output.name,
                shown(other),
                shown(first)
            );
            return Err(report::finding(source, run, kind, None, message, String::new()));
        }
        Ok(())
    }
}
