//! A GGUF model file: what it says about its model, and its weights as MLX arrays.

mod config;
mod header;
mod metadata;
mod reader;
#[cfg(test)]
pub(crate) mod synthetic;
mod tensor;
#[cfg(test)]
mod tests;

pub(crate) use config::LlamaConfig;
pub(crate) use metadata::{Metadata, required};

use std::{
    fs::{File, OpenOptions},
    io::BufReader,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use mlx_primitives::quant::QuantizedWeight;
use mlx_rs::{Array, io::GgufFile};

use header::Header;

/// GGUF's Q4 and Q8 blocks: one scale for this many weights of a row.
const GROUP_SIZE: i32 = 32;

/// An opened model file.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    config: LlamaConfig,
    metadata: Metadata,
    arrays: GgufFile,
}

/// One matrix or vector of the model.
#[derive(Debug)]
pub(crate) enum Weight {
    Dense(Array),
    /// As the file holds it.
    Packed(QuantizedWeight),
}

impl Checkpoint {
    /// Checks the whole header, then lets MLX load the weights.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::read(path).with_context(|| path.display().to_string())
    }

    fn read(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        let len = file.metadata()?.len();
        let header = Header::read(BufReader::new(file), len)?;
        let config = LlamaConfig::new(&header)?;
        let arrays = GgufFile::load(path)?;
        Ok(Self { config, metadata: header.metadata, arrays })
    }

    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.config
    }

    pub(crate) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The weight called `name` without its `.weight`: `blk.0.attn_q`, `token_embd`, `output_norm`.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight> {
        let weight = self.array(name, "weight")?;
        if self.arrays.get_array(&format!("{name}.scales"))?.is_none() {
            return Ok(Weight::Dense(weight));
        }
        let scales = self.array(name, "scales")?;
        let biases = self.array(name, "biases")?;
        let bits = bits(&weight, &scales).with_context(|| format!("tensor {name:?}"))?;
        let packed = QuantizedWeight::from_parts((weight, scales, biases), GROUP_SIZE, bits)?;
        Ok(Weight::Packed(packed))
    }

    fn array(&self, name: &str, part: &str) -> Result<Array> {
        let name = format!("{name}.{part}");
        self.arrays.get_array(&name)?.with_context(|| format!("the file has no tensor {name:?}"))
    }
}

fn open_file(path: &Path) -> Result<File> {
    // Before it is opened, for opening a pipe waits for whoever writes to it.
    let metadata = path.metadata().context("give --model the path of a GGUF file")?;
    ensure!(metadata.is_file(), "not a file");
    let file = File::open(path)?;
    // MLX opens GGUF files this way, and says no more than "gguf_init failed" when it cannot.
    let writable = OpenOptions::new().read(true).append(true).open(path);
    writable.context("MLX opens GGUF files for writing: make the file writable")?;
    Ok(file)
}

/// A u32 holds 32 bits, so a row of `n` of them over `m` groups has `n · 32 / (m · 32)` bits each.
fn bits(weight: &Array, scales: &Array) -> Result<i32> {
    let (columns, groups) = (weight.shape().last(), scales.shape().last());
    let (columns, groups) = columns.zip(groups).context("packed weights have no columns")?;
    let bits = columns * u32::BITS as i32 / (groups * GROUP_SIZE);
    ensure!(bits == 4 || bits == 8, "packed in {bits} bits, expected 4 or 8");
    Ok(bits)
}
