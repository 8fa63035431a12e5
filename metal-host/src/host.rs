//! The runner.

use std::path::PathBuf;

use crate::{
    compiler::Compiler,
    error::{Error, Kind, Result},
    generate::{Generated, generate},
    job::{Ending, Job},
    launch::{Launch, Run},
    lint, report,
    source::{Output, Source},
};

/// Compiles kernels for this machine's CPU and runs them.
///
/// It may be shared by threads, and its cache by processes.
#[derive(Debug)]
pub struct Host {
    compiler: Compiler,
}

impl Host {
    /// A runner that keeps what it compiles in the folder `cache`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] without a clang that will do; [`Error::Io`] when the folder cannot be written.
    pub fn new(cache: impl Into<PathBuf>) -> Result<Host> {
        Ok(Host { compiler: Compiler::new(&cache.into())? })
    }

    /// Runs the kernel once, on the bytes of its inputs, and returns the bytes of its outputs, then
    /// those of the inputs that are [written](crate::Input::written).
    ///
    /// # Errors
    /// Every [`Error`] but [`Error::NoCompiler`]. A finding is one that a single run can make: outputs that
    /// depend on the schedule or on earlier memory only [`Host::check`] sees.
    pub fn run(
        &self,
        source: &Source,
        launch: Launch,
        inputs: &[&[u8]],
        run: Run,
    ) -> Result<Vec<Vec<u8>>> {
        self.prepare(source, launch, inputs)?.run(run)
    }

    /// Checks all that can be checked without running.
    pub(crate) fn prepare<'a>(
        &'a self,
        source: &'a Source,
        launch: Launch,
        inputs: &'a [&'a [u8]],
    ) -> Result<Prepared<'a>> {
        check_names(source)?;
        check_arrays(source, inputs)?;
        check_launch(source, launch)?;
        lint::check(source)?;
        Ok(Prepared { host: self, source, generated: generate(source), launch, inputs })
    }
}

/// A kernel and its arguments, ready to be run in several ways.
pub(crate) struct Prepared<'a> {
    host: &'a Host,
    pub(crate) source: &'a Source,
    generated: Generated,
    pub(crate) launch: Launch,
    inputs: &'a [&'a [u8]],
}

impl Prepared<'_> {
    pub(crate) fn run(&self, run: Run) -> Result<Vec<Vec<u8>>> {
        let (source, generated) = (self.source, &self.generated);
        let compiler = &self.host.compiler;
        let compiled = compiler.compiled(source, generated, run.build, run.fast_contract)?;
        let job = Job { source, generated, launch: self.launch, inputs: self.inputs, run: &run };
        match job.run(&compiled)? {
            Ending::Outputs(outputs) => Ok(outputs),
            Ending::Failed { status, said } => Err(report::read(source, &run, status, said)),
            Ending::TimeOut => {
                let message = format!("it did not end in {:?}", run.time_limit);
                Err(report::finding(source, &run, Kind::TimeOut, None, message, String::new()))
            }
        }
    }
}

/// More than any GPU's buffer has.
const MAX_BYTES: usize = 1 << 40;

fn invalid(source: &Source, reason: String) -> Error {
    Error::Invalid { kernel: source.name.clone(), reason }
}

fn check_names(source: &Source) -> Result<()> {
    if !source.name.chars().all(is_word) {
        return Err(invalid(source, "the name must be letters, digits and underscores".to_owned()));
    }
    let inputs = source.inputs.iter().map(|input| &input.name);
    let outputs = source.outputs.iter().map(|output| &output.name);
    let template = source.template.iter().map(|(name, _)| name);
    if let Some(name) = inputs.chain(outputs).chain(template).find(|name| !is_identifier(name)) {
        return Err(invalid(source, format!("`{name}` is no name for a parameter")));
    }
    match source.template.iter().find(|(_, value)| value.is_negative()) {
        Some((name, value)) => {
            Err(invalid(source, format!("{name} is {value:?}, and MLX puts it in a name")))
        }
        None => Ok(()),
    }
}

fn check_arrays(source: &Source, inputs: &[&[u8]]) -> Result<()> {
    if source.outputs.is_empty() {
        return Err(invalid(source, "a kernel must have an output".to_owned()));
    }
    let too_large = |output: &&Output| output.bytes().is_none_or(|bytes| bytes > MAX_BYTES);
    if let Some(output) = source.outputs.iter().find(too_large) {
        return Err(invalid(source, format!("`{}` is larger than memory", output.name)));
    }
    if inputs.len() != source.inputs.len() {
        let (needed, given) = (source.inputs.len(), inputs.len());
        return Err(invalid(source, format!("it has {needed} inputs but was given {given}")));
    }
    for (input, bytes) in source.inputs.iter().zip(inputs) {
        if input.bytes() != Some(bytes.len()) {
            let (name, shape, given) = (&input.name, &input.shape, bytes.len());
            let wanted = format!("{:?} of shape {shape:?}", input.element);
            return Err(invalid(source, format!("`{name}` is {wanted} but has {given} bytes")));
        }
    }
    Ok(())
}

fn check_launch(source: &Source, launch: Launch) -> Result<()> {
    if launch.grid.contains(&0) || launch.group.contains(&0) {
        return Err(invalid(source, format!("{launch:?} has an empty axis")));
    }
    if launch.group_threads() > Launch::MAX_GROUP {
        let (threads, limit) = (launch.group_threads(), Launch::MAX_GROUP);
        return Err(invalid(source, format!("a group of {threads} threads exceeds {limit}")));
    }
    Ok(())
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn is_identifier(name: &str) -> bool {
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(is_word)
}
