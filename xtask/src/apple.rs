//! The Apple side: what a Mac needs, and type-checking its build from Linux.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::distro::Family;
use crate::tools::{self, Tool};
use crate::{mlx, paths, steps};

const TRIPLE: &str = "aarch64-apple-darwin";
const ALL: &str = "--all-targets";

/// Debian's Rust for building Firefox: with the standard library's sources, no rustup needed.
const RUST_WEB: Tool = Tool {
    name: "no Rust that knows Apple's targets was found",
    packages: ["rustc-web cargo-web rust-web-src libstd-rust-web-dev", "", ""],
    found: || {
        let packages = RUST_WEB.packages[0].split_whitespace();
        steps::succeeds("dpkg", &["-s"].into_iter().chain(packages).collect::<Vec<_>>())
    },
};

/// Says which of the tools that mlx-sys's build needs are missing on this Mac.
pub(crate) fn check_tools() -> Result<()> {
    if !steps::succeeds("xcode-select", &["-p"]) {
        bail!("Xcode's command line tools are missing; install them with: xcode-select --install");
    }
    if !steps::succeeds("cmake", &["--version"]) {
        bail!("cmake was not found; install it with: brew install cmake");
    }
    if !steps::succeeds("xcrun", &["-f", "metal"]) {
        bail!(
            "Metal's compiler was not found; install Xcode, then: xcodebuild -downloadComponent MetalToolchain"
        );
    }
    eprintln!("Xcode's tools, cmake and Metal's compiler are here; cargo builds MLX itself");
    Ok(())
}

/// Type-checks the library, its examples, tests and benches as a Mac builds them, Metal included.
pub(crate) fn check() -> Result<()> {
    if cfg!(target_os = "macos") {
        check_tools()?;
        return steps::run(&mut steps::cargo(["check", ALL]));
    }
    let home = mlx::setup()?;
    let dir = paths::target().join("check-apple");
    std::fs::create_dir_all(&dir)?;
    let config = dir.join("config.toml");
    mlx::cargo_config::write(&config, &mlx::cargo_config::check_only(TRIPLE, &home.out())?)?;
    let mut cargo = cargo()?;
    cargo.args(["check", ALL]).args(["--target", TRIPLE, "--config"]).arg(config);
    eprintln!("$ {}", steps::shown(&cargo));
    steps::run(cargo.env("CARGO_TARGET_DIR", dir))
}

/// A cargo that can check for [`TRIPLE`]: this one with rustup's target, or Debian's.
fn cargo() -> Result<Command> {
    if has_target() {
        return Ok(steps::cargo([""; 0]));
    }
    if Family::here() != Some(Family::Debian) {
        bail!("{}; install it with: rustup target add {TRIPLE}", RUST_WEB.name);
    }
    tools::ensure(&[RUST_WEB])?;
    let mut cargo = Command::new("/usr/bin/cargo");
    // The standard library is checked along with the rest, which only nightly allows by itself.
    cargo.arg("-Zbuild-std=std,panic_abort,test").env("RUSTC_BOOTSTRAP", "1");
    cargo.env("RUSTC", "/usr/bin/rustc").current_dir(paths::root());
    // Of the cargo that runs this program, another version.
    for name in ["RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH", "RUSTFLAGS", "RUSTDOC", "CARGO"] {
        cargo.env_remove(name);
    }
    Ok(cargo)
}

fn has_target() -> bool {
    let args = ["--print", "target-libdir", "--target", TRIPLE];
    let output = Command::new("rustc").args(args).current_dir(paths::root()).output();
    output.is_ok_and(|output| {
        let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        !dir.as_os_str().is_empty() && Path::exists(&dir)
    })
}
