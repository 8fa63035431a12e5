//! Generates mlx-sys's bindings, as its `bindgen_config.rs` does, with the half types added.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::source;

const HALF: &str = include_str!("../../native/half.h");

/// The half types as mlx-rs uses them: one it builds and compares, one it treats as bits.
const HALF_TYPES: &str = "\
#[repr(transparent)]
#[derive(Debug, Clone, Copy, Default)]
pub struct float16_t(pub u16);
pub type bfloat16_t = u16;";

/// Writes the bindings of `mlx_c` to `to`; `scratch` takes a header that libclang reads.
pub(super) fn write(mlx_c: &Path, scratch: &Path, to: &Path) -> Result<()> {
    let half = scratch.join("half.h");
    fs::write(&half, HALF)?;
    let mut builder = bindgen::Builder::default()
        // As in mlx-sys; the choice changes what is generated.
        .rust_target("1.73.0".parse().context("bindgen does not know Rust 1.73")?)
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_args(["-include", &half.to_string_lossy()])
        .blocklist_function("malloc|realloc")
        .blocklist_type("float16_t|bfloat16_t")
        .raw_line(HALF_TYPES);
    for header in source::files(mlx_c, "h")? {
        builder = builder.header(header.to_string_lossy());
    }
    let bindings = builder
        .generate()
        .context("libclang cannot read mlx-c's headers; is its package (libclang-dev) whole?")?;
    bindings.write_to_file(to)?;
    Ok(fs::remove_file(half)?)
}
