//! Packs what runs on an NVIDIA machine without network into one file.
mod fatbin;
mod launcher;
mod programs;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::Progress;
use crate::{cached, mlx, paths, steps, tools};

/// The name of the folder that a bundle unpacks to.
const NAME: &str = "mlx-primitives";

/// Writes the bundle for GPUs of generation `arch` (`sm_90`) to `to`, or into the target folder.
pub(crate) fn run(arch: &str, to: Option<PathBuf>) -> Result<()> {
    let number = generation(arch)?;
    if !cfg!(target_os = "linux") {
        bail!("bundles are made on Linux, as their programs run there");
    }
    let to = to.unwrap_or_else(|| paths::target().join(format!("{NAME}-cuda13-{arch}.tar.xz")));
    fs::create_dir_all(folder(&to)).with_context(|| format!("cannot write {}", to.display()))?;
    tools::ensure(&[tools::XZ])?;
    mlx::setup()?;
    let cuda = mlx::cuda::provide()?;
    let stage = paths::target().join(format!("bundle.tmp-{}", std::process::id()));
    // In the folder of the result, so that a cut run leaves no half bundle by its name.
    let unfinished = folder(&to).join(format!(".{NAME}.tmp-{}", std::process::id()));
    let packed = fill(&stage, &cuda, number)
        .and_then(|()| pack(&stage, &cuda, &unfinished))
        .and_then(|()| Ok(fs::rename(&unfinished, &to)?));
    cached::remove(&stage);
    cached::remove(&unfinished);
    packed?;
    let size = fs::metadata(&to)?.len() as f64 / 1e6;
    eprintln!("wrote {} ({size:.1} MB)", to.display());
    Ok(())
}

/// The folder that `file` is in, also where only its name is given.
fn folder(file: &Path) -> &Path {
    file.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

fn generation(arch: &str) -> Result<u32> {
    let number = arch.strip_prefix("sm_").and_then(|number| number.parse().ok());
    number.with_context(|| format!("--arch must be like sm_90 but is {arch}"))
}

/// Puts into `stage` what the bundle has beyond the files of the wheel in `cuda`.
fn fill(stage: &Path, cuda: &Path, arch: u32) -> Result<()> {
    let bin = stage.join("bin");
    fs::create_dir_all(&bin)?;
    for (name, executable) in programs::build()? {
        fs::copy(&executable, bin.join(name))?;
    }
    for (name, script) in launcher::SCRIPTS {
        let script_file = stage.join(name);
        fs::write(&script_file, script)?;
        fs::set_permissions(&script_file, fs::Permissions::from_mode(0o755))?;
    }
    Progress::during("blanking other GPUs' code", 0, |_| {
        let mut library = fs::read(cuda.join("mlx/lib/libmlx.so"))?;
        let kept = fatbin::keep_only(&mut library, arch)?;
        fs::create_dir_all(stage.join("mlx/lib"))?;
        fs::write(stage.join("mlx/lib/libmlx.so"), library)?;
        eprintln!("kept the code for sm_{kept}");
        Ok(())
    })
}

fn pack(stage: &Path, cuda: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--owner=0", "--group=0", "--use-compress-program=xz -T0 -7"]);
    tar.arg(format!("--transform=s,^,{NAME}/,")).arg("--file").arg(to);
    tar.arg("-C").arg(stage).args(launcher::SCRIPTS.map(|(name, _)| name)).args(["bin", "mlx/lib"]);
    // What the wheel itself holds of that it needs: a BLAS, and headers for kernels compiled at
    // run time. NVIDIA's libraries are the target machine's.
    let headers = ["cccl", "cute", "cutlass"].map(|name| format!("mlx/include/{name}"));
    tar.arg("-C").arg(cuda).arg("mlx_cuda_13.libs").args(headers);
    Progress::during("packing", 0, |_| steps::run(&mut tar).context("tar failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_file_name_is_in_the_current_folder() {
        assert_eq!(folder(Path::new("bundle.tar.xz")), Path::new("."));
        assert_eq!(folder(Path::new("out/bundle.tar.xz")), Path::new("out"));
    }

    #[test]
    fn generations_are_numbers_after_sm() {
        assert_eq!(generation("sm_90").ok(), Some(90));
        assert!(generation("90").is_err());
        assert!(generation("sm_90a").is_err());
        assert!(generation("").is_err());
    }
}
