//! Compiles mlx-c and the one function that Linux lacks into static libraries.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};

use super::source;
use crate::progress::Progress;
use crate::{steps, tools};

const COMPAT: &str = include_str!("../../native/compat.h");
const MACH_TIME: &str = include_str!("../../native/mach_time.c");

/// Compiles `mlx_c` against the wheel's headers into `home`'s `libmlxc.a`.
pub(super) fn mlx_c(mlx_c: &Path, home: &Path) -> Result<()> {
    let sources = source::files(mlx_c, "cpp")?;
    let objects = Objects::new(home)?;
    let compat = objects.0.join("compat.h");
    fs::write(&compat, COMPAT)?;
    let cxx = tools::needed(tools::cxx(), tools::CXX)?;
    let command = |source: &Path| {
        let mut command = Command::new(&cxx);
        command.args(["-std=c++20", "-O2", "-fPIC", "-include"]).arg(&compat);
        command.arg("-I").arg(mlx_c).arg("-I").arg(home.join("mlx/include"));
        command.arg("-c").arg(source).arg("-o").arg(objects.of(source));
        command
    };
    Progress::during("compiling mlx-c", sources.len(), |progress| {
        in_parallel(&sources, |source| {
            compile(command(source), source)?;
            progress.step();
            Ok(())
        })
    })?;
    objects.archive(&sources, &home.join("lib/libmlxc.a"))
}

/// Compiles the stand-in for Apple's clock into `home`'s `libmachtime.a`.
pub(super) fn mach_time(home: &Path) -> Result<()> {
    let objects = Objects::new(home)?;
    let source = objects.0.join("mach_time.c");
    fs::write(&source, MACH_TIME)?;
    let mut command = Command::new(tools::needed(tools::cxx(), tools::CXX)?);
    command.args(["-x", "c", "-O2", "-fPIC", "-c"]).arg(&source);
    command.arg("-o").arg(objects.of(&source));
    compile(command, &source)?;
    objects.archive(&[source], &home.join("lib/libmachtime.a"))
}

/// A folder for object files, gone once they are archived.
struct Objects(PathBuf);

impl Objects {
    fn new(home: &Path) -> Result<Objects> {
        let dir = home.join("objects");
        fs::create_dir(&dir)?;
        Ok(Objects(dir))
    }

    fn of(&self, source: &Path) -> PathBuf {
        self.0.join(source.file_name().unwrap_or_default()).with_extension("o")
    }

    fn archive(self, sources: &[PathBuf], to: &Path) -> Result<()> {
        let mut ar = Command::new("ar");
        ar.arg("crs").arg(to).args(sources.iter().map(|source| self.of(source)));
        steps::run(&mut ar).with_context(|| format!("cannot write {}", to.display()))?;
        Ok(fs::remove_dir_all(&self.0)?)
    }
}

fn compile(mut command: Command, source: &Path) -> Result<()> {
    let output = steps::output(&mut command)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().find(|line| line.contains("error")).unwrap_or("no reason given");
    bail!("{} could not compile {}: {why}", command.get_program().display(), source.display())
}

/// Does `work` for every item, on all cores; stops early with the first error.
fn in_parallel(items: &[PathBuf], work: impl Fn(&Path) -> Result<()> + Sync) -> Result<()> {
    let left = Mutex::new(items.iter());
    let take = || left.lock().ok()?.next();
    let worker = || {
        while let Some(item) = take() {
            work(item).inspect_err(|_| while take().is_some() {})?;
        }
        Ok(())
    };
    let threads = thread::available_parallelism()?.get().min(items.len());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => bail!("a compiling thread panicked"),
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_once_and_the_first_error_wins() {
        let items: Vec<_> = (0..50).map(|i| PathBuf::from(i.to_string())).collect();
        let done = AtomicUsize::new(0);
        let count = |_: &Path| {
            done.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        assert!(in_parallel(&items, count).is_ok());
        assert_eq!(done.load(Ordering::Relaxed), items.len());
        assert!(in_parallel(&items, |item| bail!("{}", item.display())).is_err());
        assert!(in_parallel(&[], |_| bail!("none to do")).is_ok());
    }
}
