//! One run of a compiled kernel, in a process of its own.

use std::{
    borrow::Cow,
    fs::{self, File},
    io,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    error::{Error, Result},
    generate::{Generated, Slot},
    launch::{Launch, Run},
    source::{Input, Source},
};

/// How a process ended.
pub(crate) enum Ending {
    Outputs(Vec<Vec<u8>>),
    Failed { status: ExitStatus, said: String },
    TimeOut,
}

/// What the sanitizers are asked.
const SANITIZER_OPTIONS: [(&str, &str); 4] = [
    ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0"),
    ("UBSAN_OPTIONS", "print_stacktrace=1"),
    ("TSAN_OPTIONS", "halt_on_error=1"),
    ("MSAN_OPTIONS", "poison_in_free=0"),
];

/// The environment of a run. Lines are named by addr2line, which comes with the linker; LLVM's own tool does not
/// come with clang everywhere.
fn environment() -> impl Iterator<Item = (&'static str, String)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tool = std::env::split_paths(&path).map(|folder| folder.join("addr2line"));
    let tool = tool.into_iter().find(|tool| tool.is_file());
    let symbolizer = tool.map(|tool| format!(":external_symbolizer_path={}", tool.display()));
    let symbolizer = symbolizer.unwrap_or_default();
    SANITIZER_OPTIONS.into_iter().map(move |(name, value)| (name, format!("{value}{symbolizer}")))
}

/// A kernel and all that one run of it needs.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) generated: &'a Generated,
    pub(crate) launch: Launch,
    pub(crate) inputs: &'a [&'a [u8]],
    pub(crate) run: &'a Run,
}

impl Job<'_> {
    /// Runs it by `runner` with the kernel in `library`.
    pub(crate) fn run(&self, (runner, library): &(PathBuf, PathBuf)) -> Result<Ending> {
        let scratch = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let [job, output, stderr] =
            ["job", "output", "stderr"].map(|name| scratch.path().join(name));
        fs::write(&job, self.encoded()).map_err(Error::io(&job))?;
        let said = File::create(&stderr).map_err(Error::io(&stderr))?;
        let mut command = Command::new(runner);
        command.arg(library).arg(&job).arg(&output).envs(environment());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let child = command.spawn().map_err(Error::io(runner))?;
        match wait(child, self.run.time_limit).map_err(Error::io(runner))? {
            None => Ok(Ending::TimeOut),
            Some(status) if status.success() => {
                let bytes = fs::read(&output).map_err(Error::io(&output))?;
                Ok(Ending::Outputs(self.split(&bytes)))
            }
            Some(status) => {
                let said = fs::read(&stderr).map_err(Error::io(&stderr))?;
                Ok(Ending::Failed { status, said: String::from_utf8_lossy(&said).into_owned() })
            }
        }
    }

    /// The job file; `runtime/runner.cpp` describes it.
    fn encoded(&self) -> Vec<u8> {
        let mut job = Vec::new();
        for size in self.launch.grid.into_iter().chain(self.launch.group) {
            job.extend(size.to_ne_bytes());
        }
        job.extend(self.run.schedule.to_ne_bytes());
        job.extend(u32::from(self.run.poison).to_ne_bytes());
        job.extend((self.generated.buffers.len() as u32).to_ne_bytes());
        for &slot in &self.generated.buffers {
            let (kind, length, bytes) = self.buffer(slot);
            job.extend(kind.to_ne_bytes());
            job.extend((length as u64).to_ne_bytes());
            job.extend(bytes.iter());
        }
        job
    }

    /// A buffer's kind, its length, and the bytes that the job holds of it.
    fn buffer(&self, slot: Slot) -> (u64, usize, Cow<'_, [u8]>) {
        let input = |bytes: Cow<'static, [u8]>| (INPUT, bytes.len(), bytes);
        match slot {
            Slot::Input(index) => {
                let kind = if self.source.inputs[index].written { WRITTEN_INPUT } else { INPUT };
                (kind, self.inputs[index].len(), self.inputs[index].into())
            }
            Slot::Shape(index) => {
                let shape = self.source.inputs[index].shape.iter();
                input(shape.flat_map(|&axis| (axis as i32).to_ne_bytes()).collect())
            }
            Slot::Strides(index) => {
                let strides = strides(&self.source.inputs[index]);
                input(strides.into_iter().flat_map(i64::to_ne_bytes).collect())
            }
            Slot::Ndim(index) => {
                let axes = self.source.inputs[index].shape.len() as i32;
                input(axes.to_ne_bytes().to_vec().into())
            }
            Slot::Output(index) => {
                let output = &self.source.outputs[index];
                let length = output.bytes().unwrap_or_default();
                let Some(value) = self.run.init_value else {
                    return (OUTPUT, length, Cow::default());
                };
                let count = length / output.element.bytes();
                (FILLED_OUTPUT, length, output.element.encode(value).repeat(count).into())
            }
        }
    }

    /// What the runner wrote, one after the other.
    fn split(&self, mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let take = |length: usize| {
            let (array, rest) = bytes.split_at(length.min(bytes.len()));
            bytes = rest;
            array.to_vec()
        };
        self.source.returned().map(|array| array.bytes).map(take).collect()
    }
}

const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const FILLED_OUTPUT: u64 = 2;
const WRITTEN_INPUT: u64 = 3;

/// Waits for `child`, but not longer than `limit`: a kernel that waits for another thread's write never ends.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// The strides of an input: its own, or those of rows that follow each other.
fn strides(input: &Input) -> Vec<i64> {
    if let Some(strides) = &input.strides {
        return strides.iter().map(|&stride| stride as i64).collect();
    }
    let mut strides = vec![1; input.shape.len()];
    for axis in (1..input.shape.len()).rev() {
        strides[axis - 1] = strides[axis] * input.shape[axis] as i64;
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Element;

    #[test]
    fn strides_are_those_of_rows_that_follow_each_other() {
        let strides = |shape: &[usize]| strides(&Input::new("x", Element::F32, shape));
        assert_eq!(strides(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(strides(&[5]), [1]);
        assert_eq!(strides(&[2, 0, 4]), [0, 4, 1]);
        let strided = Input::new("x", Element::F32, [2, 3]).with_strides([1, 2]);
        assert_eq!(super::strides(&strided), [1, 2]);
    }
}
