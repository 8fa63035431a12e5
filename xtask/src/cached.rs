//! Folders and files of the cache, which are whole or not there.
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};

/// Returns `place`, made by `build` first if it is not there.
///
/// `build` works on a temporary sibling, renamed when complete: a cut run leaves nothing that
/// looks whole, and the next one sweeps up what it left.
pub(crate) fn provide(place: &Path, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if place.exists() {
        return Ok(());
    }
    let dir = place.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    sweep(dir)?;
    let temporary = temporary(place, process::id());
    let made = build(&temporary).and_then(|()| settle(&temporary, place));
    if made.is_err() {
        remove(&temporary);
    }
    made
}

fn settle(temporary: &Path, place: &Path) -> Result<()> {
    match fs::rename(temporary, place) {
        // Another run was faster; its result is as good.
        Err(_) if place.exists() => remove(temporary),
        done => done.with_context(|| format!("cannot write {}", place.display()))?,
    }
    Ok(())
}

const MARK: &str = ".tmp-";

fn temporary(place: &Path, pid: u32) -> PathBuf {
    let mut name = place.file_name().unwrap_or_default().to_owned();
    name.push(format!("{MARK}{pid}"));
    place.with_file_name(name)
}

/// Removes the temporaries in `dir` whose process is gone.
fn sweep(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if owner(&entry.file_name()).is_some_and(|pid| !alive(pid)) {
            remove(&entry.path());
        }
    }
    Ok(())
}

fn owner(name: &OsStr) -> Option<u32> {
    let (_, pid) = name.to_str()?.rsplit_once(MARK)?;
    pid.parse().ok()
}

fn alive(pid: u32) -> bool {
    pid != process::id() && Path::new("/proc").join(pid.to_string()).exists()
}

/// Removes a file or folder as well as it can: what stays is swept up next time.
pub(crate) fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xtask-{name}-{}", process::id()));
        remove(&dir);
        dir
    }

    #[test]
    fn failure_leaves_nothing_and_success_is_kept() -> Result<()> {
        let dir = scratch("provide");
        let place = dir.join("thing");
        let failed = provide(&place, |at| {
            fs::create_dir(at)?;
            fs::write(at.join("half"), "written")?;
            bail!("cut")
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_dir(&dir)?.count(), 0);
        provide(&place, |at| Ok(fs::write(at, "whole")?))?;
        provide(&place, |_| bail!("built twice"))?;
        assert_eq!(fs::read_to_string(&place)?, "whole");
        remove(&dir);
        Ok(())
    }

    #[test]
    fn temporaries_of_dead_processes_are_swept() -> Result<()> {
        let dir = scratch("sweep");
        let stale = temporary(&dir.join("thing"), u32::MAX);
        let live = temporary(&dir.join("thing"), 1);
        fs::create_dir_all(stale.join("deep"))?;
        fs::create_dir_all(&live)?;
        sweep(&dir)?;
        assert!(!stale.exists());
        assert!(live.exists() || !Path::new("/proc/1").exists());
        remove(&dir);
        Ok(())
    }
}
