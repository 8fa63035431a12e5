//! The programs and libraries that setting up needs, and how to get them.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::distro::{Family, is_root};
use crate::progress::Progress;
use crate::steps;

/// Something this machine must have, and the package that brings it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// What it is called in a message.
    pub(crate) name: &'static str,
    /// Its packages by [`Family`]: Debian, Fedora, Arch.
    pub(crate) packages: [&'static str; 3],
    /// Whether it is here.
    pub(crate) found: fn() -> bool,
}

pub(crate) const CXX: Tool = Tool {
    name: "no C++ compiler was found",
    packages: ["g++", "gcc-c++", "gcc"],
    found: || cxx().is_some(),
};
pub(crate) const AR: Tool = Tool {
    name: "ar was not found",
    packages: ["binutils", "binutils", "binutils"],
    found: || steps::succeeds("ar", &["--version"]),
};
pub(crate) const PYTHON: Tool = Tool {
    name: "python3 was not found",
    packages: ["python3", "python3", "python"],
    found: || PYTHONS.iter().any(|python| steps::succeeds(python, &["--version"])),
};
pub(crate) const PIP: Tool = Tool {
    name: "python3 has no pip",
    packages: ["python3-pip", "python3-pip", "python-pip"],
    found: || pip_python().is_some(),
};
pub(crate) const LIBCLANG: Tool = Tool {
    name: "libclang was not found",
    packages: ["libclang-dev", "clang-devel", "clang"],
    found: || clang_sys::load().is_ok(),
};
pub(crate) const OPENBLAS: Tool = Tool {
    name: "OpenBLAS was not found",
    packages: ["libopenblas0-pthread", "openblas-threads", "openblas"],
    found: || openblas().is_some(),
};
/// Compiles kernels written for Metal to run them on the CPU; older versions cannot.
pub(crate) const CLANG: Tool = Tool {
    name: "clang 19 was not found",
    packages: ["clang-19", "clang", "clang"],
    found: || clang().is_some(),
};
pub(crate) const SANITIZERS: Tool = Tool {
    name: "clang's sanitizers were not found",
    packages: ["libclang-rt-19-dev", "compiler-rt", "compiler-rt"],
    found: || clang().is_some_and(has_sanitizers),
};
pub(crate) const XZ: Tool = Tool {
    name: "xz was not found",
    packages: ["xz-utils", "xz", "xz"],
    found: || steps::succeeds("xz", &["--version"]),
};

/// The C++ compiler: `$CXX`, or the first of the usual names that runs.
pub(crate) fn cxx() -> Option<String> {
    let own = std::env::var("CXX").ok().filter(|own| !own.is_empty());
    let names = ["c++", "g++", "clang++"].map(String::from);
    own.into_iter().chain(names).find(|name| steps::succeeds(name, &["--version"]))
}

/// The clang that `metal-host` finds: the packaged 19, or the plain name for one that is no older.
fn clang() -> Option<&'static str> {
    ["clang++-19", "clang++"].into_iter().find(|name| {
        let version = said(name, "-dumpversion");
        let major = version.and_then(|version| version.split('.').next()?.parse().ok());
        major.is_some_and(|major: u32| major >= 19)
    })
}

/// Whether `clang` can link with what [`SANITIZERS`] brings; its name has changed between versions.
fn has_sanitizers(clang: &str) -> bool {
    let names =
        [format!("libclang_rt.msan-{}.a", std::env::consts::ARCH), "libclang_rt.msan.a".to_owned()];
    names.iter().any(|name| {
        let place = said(clang, &format!("-print-file-name={name}"));
        place.is_some_and(|place| Path::new(place.trim()).is_absolute())
    })
}

/// What `program` writes when asked one thing.
fn said(program: &str, question: &str) -> Option<String> {
    let output = steps::output(Command::new(program).arg(question)).ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The Python on the path, and the system's, which may have pip where that one has not.
const PYTHONS: [&str; 2] = ["python3", "/usr/bin/python3"];

/// A Python that has pip.
pub(crate) fn pip_python() -> Option<&'static str> {
    let has_pip = |python: &&str| steps::succeeds(python, &["-m", "pip", "--version"]);
    PYTHONS.into_iter().find(has_pip)
}

/// OpenBLAS's shared library, the variant with threads of its own first.
pub(crate) fn openblas() -> Option<PathBuf> {
    let debian = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let places = [
        format!("{debian}/openblas-pthread/libopenblas.so.0"),
        format!("{debian}/libopenblas.so.0"),
        "/usr/lib64/libopenblasp.so.0".into(),
        "/usr/lib64/libopenblas.so.0".into(),
        "/usr/lib/libopenblas.so.0".into(),
        "/usr/local/lib/libopenblas.so.0".into(),
    ];
    places.into_iter().map(PathBuf::from).find(|place| place.exists())
}

/// Makes sure that all of `tools` are here: root on Debian gets them installed, anyone else told.
pub(crate) fn ensure(tools: &[Tool]) -> Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let family = Family::here();
    let able = family == Some(Family::Debian) && is_root();
    let tried = if able { install(&missing) } else { Ok(()) };
    match self::missing(&missing)[..] {
        [] => Ok(()),
        ref missing => match tried {
            Ok(()) => bail!(advice(missing, family)),
            Err(error) => Err(error.context(advice(missing, family))),
        },
    }
}

/// As [`ensure`], for tools that can be done without: if they cannot be had, tells how and what `is_lost`.
pub(crate) fn offer(tools: &[Tool], is_lost: &str) {
    if let Err(error) = ensure(tools) {
        eprintln!("note: {error:#}; without that, {is_lost}");
    }
}

fn missing(tools: &[Tool]) -> Vec<Tool> {
    tools.iter().filter(|tool| !(tool.found)()).copied().collect()
}

fn install(tools: &[Tool]) -> Result<()> {
    let packages: Vec<_> =
        tools.iter().flat_map(|tool| tool.packages[0].split_whitespace()).collect();
    Progress::during(format!("installing {}", packages.join(" ")), 0, |_| {
        apt_get(&["update"])?;
        let install = ["install", "--yes", "--no-install-recommends"];
        apt_get(&[&install[..], &packages].concat())
    })
}

fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("-q").args(args).env("DEBIAN_FRONTEND", "noninteractive");
    let output = steps::output(&mut command)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().find(|line| line.starts_with("E:")).unwrap_or("it failed");
        bail!("apt-get {}: {why}", args.join(" "));
    }
    Ok(())
}

fn advice(missing: &[Tool], family: Option<Family>) -> String {
    let names: Vec<_> = missing.iter().map(|tool| tool.name).collect();
    let shown = family.unwrap_or(Family::Debian);
    let packages: Vec<_> = missing.iter().map(|tool| tool.packages[shown as usize]).collect();
    let sudo = if is_root() { "" } else { "sudo " };
    let (pronoun, packages) = (if names.len() == 1 { "it" } else { "them" }, packages.join(" "));
    let how = match family {
        Some(family) => format!("with: {sudo}{} {packages}", family.installer()),
        None => format!("with your package manager (Debian's names: {packages})"),
    };
    format!("{}; install {pronoun} {how}", names.join(", "))
}

/// The path of an executable that is needed and was ensured before.
pub(crate) fn needed<T>(found: Option<T>, tool: Tool) -> Result<T> {
    found.context(tool.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_thing_and_the_command() {
        let text = advice(&[PIP], Some(Family::Debian));
        assert!(text.starts_with("python3 has no pip; install it with: "), "{text}");
        assert!(text.ends_with("apt-get install python3-pip"), "{text}");
        let text = advice(&[CXX, OPENBLAS], Some(Family::Fedora));
        assert!(text.ends_with("dnf install gcc-c++ openblas-threads"), "{text}");
        assert!(advice(&[XZ], None).contains("xz-utils"));
    }
}
