//! clang: which one, with which flags, and what it makes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Mutex,
};

use crate::{
    error::{Error, Result},
    files,
    generate::Generated,
    launch::Build,
    place,
    source::Source,
};

/// In the order they are tried. Versions before 19 round neither half nor bfloat after each operation.
const NAMES: [&str; 2] = ["clang++-19", "clang++"];
const OLDEST: u32 = 19;

/// Of a kernel's text: Metal's meaning of literals, one rounding an operation, lines in reports.
const KERNEL_FLAGS: &str = "-std=c++17 -fno-exceptions -fno-rtti -fno-omit-frame-pointer -g1 -gdwarf-4 -fPIC \
    -Xclang -cl-single-precision-constant \
    -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none \
    -Wno-unknown-attributes -Wno-user-defined-literals -Wimplicit-float-conversion \
    -fno-caret-diagnostics -fno-diagnostics-fixit-info -ferror-limit=20";
const RUNTIME_FLAGS: &str = "-std=c++17 -O2 -g1";
/// Instructions for half precision and fused products, without which clang calls libraries that may be absent.
const MACHINE_FLAGS: &str = if cfg!(target_arch = "x86_64") { "-mf16c -mfma" } else { "" };

/// Without the selector of instructions that is clang's choice here: version 19's makes wrong numbers of bfloats.
const UNOPTIMISED: &str = "-O0 -mllvm -fast-isel=0";
const UNOPTIMISED_FILLED: &str = "-O0 -mllvm -fast-isel=0 -ftrivial-auto-var-init=pattern";

impl Build {
    fn optimisation(self) -> &'static str {
        match self {
            Build::Plain => "-O2 -ftrivial-auto-var-init=pattern",
            Build::Address => UNOPTIMISED_FILLED,
            Build::Thread => UNOPTIMISED,
            // Filling variables would hide that nothing else did.
            Build::Memory => UNOPTIMISED,
        }
    }

    fn sanitizers(self) -> &'static str {
        match self {
            Build::Plain => "",
            // Checks of null and of where a pointer points tell of accesses that are found anyway.
            Build::Address => {
                "-fsanitize=address,undefined -fno-sanitize=null,pointer-overflow -fno-sanitize-recover=all"
            }
            Build::Thread => "-fsanitize=thread",
            // Origins tell which store an output got its bytes from. What a function is handed it may leave unused.
            Build::Memory => {
                "-fsanitize=memory -fsanitize-memory-track-origins=2 -fno-sanitize-memory-param-retval"
            }
        }
    }

    fn definition(self) -> &'static str {
        match self {
            Build::Plain => "-DMSL_PLAIN",
            Build::Address => "-DMSL_ADDRESS",
            Build::Thread => "-DMSL_THREAD",
            Build::Memory => "-DMSL_MEMORY",
        }
    }
}

/// clang, and a folder for what it makes.
#[derive(Debug)]
pub(crate) struct Compiler {
    program: &'static str,
    /// Of this crate's C++ and of clang: another version has another folder.
    folder: PathBuf,
    /// Held while what all kernels share is compiled.
    shared: Mutex<()>,
}

impl Compiler {
    pub(crate) fn new(cache: &Path) -> Result<Compiler> {
        let (program, version) = find()?;
        let flags = [KERNEL_FLAGS, RUNTIME_FLAGS, MACHINE_FLAGS, &version];
        let builds = Build::ALL
            .into_iter()
            .flat_map(|build| [build.optimisation(), build.sanitizers(), build.definition()]);
        let folder = cache.join(files::hash(files::parts().chain(flags).chain(builds)));
        let compiler = Compiler { program, folder, shared: Mutex::new(()) };
        compiler.provide(&compiler.include(), |folder| {
            files::write(folder).map_err(Error::io(folder))
        })?;
        Ok(compiler)
    }

    fn include(&self) -> PathBuf {
        self.folder.join("include")
    }

    /// What runs `source` under `build`: a program, and the library that it loads the kernel from.
    pub(crate) fn compiled(
        &self,
        source: &Source,
        generated: &Generated,
        build: Build,
        fast_contract: bool,
    ) -> Result<(PathBuf, PathBuf)> {
        let text = translation_unit(source, generated);
        let contract = if fast_contract { "fast" } else { "off" };
        let hash = files::hash([text.as_str(), contract]);
        let library = self.folder.join(format!("{hash}-{}.so", build.name()));
        let runner = self.runner(build, source)?;
        self.provide(&library, |target| {
            let file = target.with_extension("metal");
            fs::write(&file, &text).map_err(Error::io(&file))?;
            let mut command = self.kernel_command(build, contract);
            command.arg("-include-pch").arg(self.prelude(build, contract, source)?);
            let object = target.with_extension("o");
            command.args(["-x", "c++", "-c"]).arg(&file).arg("-o").arg(&object);
            judge(source, &run(&mut command)?)?;
            // Asked to link as well, clang takes longer to find the libraries that are not needed than to compile.
            let mut link = Command::new("ld");
            succeeded(source, &run(link.arg("-shared").arg(&object).arg("-o").arg(target))?)
        })?;
        Ok((runner, library))
    }

    /// Metal's library and MLX's, parsed once for all kernels of one build.
    fn prelude(&self, build: Build, contract: &str, source: &Source) -> Result<PathBuf> {
        let target = self.folder.join(format!("prelude-{contract}-{}.pch", build.name()));
        self.provide_once(&target, |target| {
            let mut command = self.kernel_command(build, contract);
            let header = self.include().join("entry.h");
            command.args(["-x", "c++-header"]).arg(header).arg("-o").arg(target);
            succeeded(source, &run(&mut command)?)
        })?;
        Ok(target)
    }

    /// The program that loads kernels of one build and runs them.
    fn runner(&self, build: Build, source: &Source) -> Result<PathBuf> {
        let target = self.folder.join(format!("runner-{}", build.name()));
        self.provide_once(&target, |target| {
            let object = target.with_extension("o");
            // Not instrumented, and so compiled without the sanitizers it is linked with.
            let mut command = self.command([RUNTIME_FLAGS, MACHINE_FLAGS, build.definition()]);
            command.arg("-c").arg(self.include().join("runner.cpp")).arg("-o").arg(&object);
            succeeded(source, &run(&mut command)?)?;
            let mut link = self.command([build.sanitizers(), "-rdynamic"]);
            succeeded(source, &run(link.arg(&object).arg("-o").arg(target))?)
        })?;
        Ok(target)
    }

    fn kernel_command(&self, build: Build, contract: &str) -> Command {
        let flags = [KERNEL_FLAGS, MACHINE_FLAGS, build.optimisation(), build.sanitizers()];
        let mut command = self.command(flags);
        command.arg(format!("-ffp-contract={contract}")).arg("-isystem").arg(self.include());
        command
    }

    fn command<'a>(&self, flags: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(self.program);
        command.args(flags.into_iter().flat_map(str::split_whitespace));
        command
    }

    /// As [`Compiler::provide`], for what several threads would all make at the start.
    fn provide_once(&self, target: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let _one_at_a_time = self.shared.lock();
        self.provide(target, make)
    }

    /// Makes `target` unless it is there. Another process may do the same at the same time: both succeed.
    fn provide(&self, target: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if target.exists() {
            return Ok(());
        }
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let scratch = tempfile::tempdir_in(&self.folder).map_err(Error::io(&self.folder))?;
        let made = scratch.path().join("made");
        make(&made)?;
        match fs::rename(&made, target) {
            Err(error) if !target.exists() => Err(Error::io(target)(error)),
            _ => Ok(()),
        }
    }
}

/// clang's name and what it says of itself.
fn find() -> Result<(&'static str, String)> {
    let none = |reason: String| Error::NoCompiler { reason };
    if !cfg!(target_os = "linux") {
        return Err(none("the runtime is written for Linux".to_owned()));
    }
    let found = NAMES.into_iter().find_map(|name| Some((name, version(name)?)));
    found.ok_or_else(|| {
        let names = NAMES.join(" nor ");
        none(format!(
            "neither {names} is a clang of version {OLDEST} or later; \
             on Debian: apt-get install clang-19 libclang-rt-19-dev"
        ))
    })
}

/// What `name` says of itself, if it is a clang that is new enough.
fn version(name: &str) -> Option<String> {
    let output = Command::new(name).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, number) = said.split_once("clang version ")?;
    let major: u32 = number.split('.').next()?.parse().ok()?;
    (major >= OLDEST).then_some(said)
}

fn run(command: &mut Command) -> Result<Output> {
    let program = PathBuf::from(command.get_program());
    command.output().map_err(Error::io(program))
}

fn succeeded(source: &Source, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Machine {
        kernel: source.name.clone(),
        message: format!("the compiler failed ({}): {said}", output.status),
    })
}

/// Reads off what clang said whether the kernel is at fault.
fn judge(source: &Source, output: &Output) -> Result<()> {
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    let narrows = report.lines().find(|line| narrows_to_bfloat(line));
    let line = narrows.or_else(|| report.lines().find(|line| line.contains("error: ")));
    let Some(line) = line else {
        return succeeded(source, output);
    };
    let (_, message) =
        line.split_once("error: ").or(line.split_once("warning: ")).unwrap_or_default();
    // An error in a library's template is followed by the line that asked for it.
    let lines = [line].into_iter().chain(report.lines());
    let place = place::of_diagnostics(lines, &place::files(source));
    let (place, message) = (place.unwrap_or_else(|| place::of_body(source)), message.to_owned());
    Err(Error::Compile { kernel: source.name.clone(), place, message, report })
}

/// What clang compiles after the prelude: MLX's text, and the call of the function.
fn translation_unit(source: &Source, generated: &Generated) -> String {
    format!(
        "#line 1 \"{}\"\n{}#line 1 \"entry\"\n{}",
        source.name,
        generated.without_instance(),
        generated.entry(source)
    )
}

/// Metal refuses to make a bfloat of a wider number unasked; clang only warns.
fn narrows_to_bfloat(line: &str) -> bool {
    let narrows = line.contains("warning: implicit conversion");
    narrows
        && line
            .split("to '")
            .nth(1)
            .is_some_and(|to| to.contains("bfloat") || to.contains("__bf16"))
}
