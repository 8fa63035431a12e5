//! One run of a compiled kernel, in a process of its own.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
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

/// What the sanitizers are asked: to stop at the first finding, and to name lines without LLVM's own tool.
const SANITIZER_OPTIONS: [(&str, &str); 4] = [
    ("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0:allow_addr2line=1"),
    ("UBSAN_OPTIONS", "print_stacktrace=1:allow_addr2line=1"),
    ("TSAN_OPTIONS", "halt_on_error=1:allow_addr2line=1"),
    ("MSAN_OPTIONS", "poison_in_malloc=0:poison_in_free=0:allow_addr2line=1"),
];

/// Runs `executable` on `inputs`.
pub(crate) fn run(
    executable: &Path,
    source: &Source,
    generated: &Generated,
    launch: Launch,
    inputs: &[&[u8]],
    run: &Run,
) -> Result<Ending> {
    let scratch = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let [job, output, stderr] = ["job", "output", "stderr"].map(|name| scratch.path().join(name));
    write(&job, source, generated, launch, inputs, run).map_err(Error::io(&job))?;
    let said = File::create(&stderr).map_err(Error::io(&stderr))?;
    let mut command = Command::new(executable);
    command.arg(&job).arg(&output).envs(SANITIZER_OPTIONS);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    let child = command.spawn().map_err(Error::io(executable))?;
    match wait(child, run.time_limit).map_err(Error::io(executable))? {
        None => Ok(Ending::TimeOut),
        Some(status) if status.success() => {
            let bytes = fs::read(&output).map_err(Error::io(&output))?;
            Ok(Ending::Outputs(split(source, &bytes)))
        }
        Some(status) => {
            let said = fs::read(&stderr).map_err(Error::io(&stderr))?;
            Ok(Ending::Failed { status, said: String::from_utf8_lossy(&said).into_owned() })
        }
    }
}

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

/// Writes the job file; `runtime/runner.cpp` describes it.
fn write(
    path: &Path,
    source: &Source,
    generated: &Generated,
    launch: Launch,
    inputs: &[&[u8]],
    run: &Run,
) -> io::Result<()> {
    let mut job = Vec::new();
    for size in launch.grid.into_iter().chain(launch.group) {
        job.extend(size.to_ne_bytes());
    }
    job.extend(run.schedule.to_ne_bytes());
    job.extend(u32::from(run.poison).to_ne_bytes());
    job.extend((generated.buffers.len() as u32).to_ne_bytes());
    for &slot in &generated.buffers {
        let (kind, bytes, length) = buffer(source, slot, inputs, run);
        job.extend(kind.to_ne_bytes());
        job.extend((length as u64).to_ne_bytes());
        job.extend(bytes);
    }
    File::create(path)?.write_all(&job)
}

const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const FILLED_OUTPUT: u64 = 2;

/// A buffer's kind, the bytes that the job holds of it, and its length.
fn buffer(source: &Source, slot: Slot, inputs: &[&[u8]], run: &Run) -> (u64, Vec<u8>, usize) {
    let input = |bytes: Vec<u8>| {
        let length = bytes.len();
        (INPUT, bytes, length)
    };
    match slot {
        Slot::Input(index) => input(inputs[index].to_vec()),
        Slot::Shape(index) => {
            let shape = source.inputs[index].shape.iter();
            input(shape.flat_map(|&axis| (axis as i32).to_ne_bytes()).collect())
        }
        Slot::Strides(index) => {
            let strides = strides(&source.inputs[index]);
            input(strides.into_iter().flat_map(i64::to_ne_bytes).collect())
        }
        Slot::Ndim(index) => {
            input((source.inputs[index].shape.len() as i32).to_ne_bytes().to_vec())
        }
        Slot::Output(index) => {
            let output = &source.outputs[index];
            let length = output.bytes().unwrap_or_default();
            match run.init_value {
                None => (OUTPUT, Vec::new(), length),
                Some(value) => {
                    let count = length / output.element.bytes();
                    (FILLED_OUTPUT, output.element.encode(value).repeat(count), length)
                }
            }
        }
    }
}

/// The strides of an array whose rows follow each other, which is how MLX passes every input.
fn strides(input: &Input) -> Vec<i64> {
    let mut strides = vec![1; input.shape.len()];
    for axis in (1..input.shape.len()).rev() {
        strides[axis - 1] = strides[axis] * input.shape[axis] as i64;
    }
    strides
}

fn split(source: &Source, mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let lengths = source.outputs.iter().map(|output| output.bytes().unwrap_or_default());
    let take = |length: usize| {
        let (output, rest) = bytes.split_at(length.min(bytes.len()));
        bytes = rest;
        output.to_vec()
    };
    lengths.map(take).collect()
}
