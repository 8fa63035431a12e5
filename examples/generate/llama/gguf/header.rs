//! Everything before the weights, checked before MLX sees the file.
//!
//! MLX maps the file and follows its lengths: a damaged one can abort or crash the process there,
//! or load without some of its tensors. Here it is an error.

use std::{collections::BTreeMap, io::Read};

use anyhow::{Result, ensure};

use super::{
    metadata::{ALIGNMENT, Metadata},
    reader::Reader,
    tensor::Tensor,
};

/// What the specification sets where the file does not.
const DEFAULT_ALIGNMENT: i64 = 32;

#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Header {
    /// Reads the header of a file of `len` bytes and checks that every tensor lies inside it.
    pub(super) fn read(input: impl Read, len: u64) -> Result<Self> {
        let mut reader = Reader::new(input, len);
        check_version(&mut reader)?;
        let tensor_count = reader.count(Tensor::MIN_BYTES)?;
        let pair_count = reader.count(PAIR_MIN_BYTES)?;
        let metadata = Metadata::read(&mut reader, pair_count)?;
        let tensors = read_tensors(&mut reader, tensor_count)?;
        let alignment = alignment(&metadata)?;
        let data_start = reader.position().next_multiple_of(alignment);
        for tensor in tensors.values() {
            tensor.check_place(data_start, alignment, reader.len())?;
        }
        Ok(Self { metadata, tensors })
    }
}

/// The least a key and its value take: key length, type, one byte.
const PAIR_MIN_BYTES: u64 = 8 + 4 + 1;

fn check_version<R: Read>(reader: &mut Reader<R>) -> Result<()> {
    ensure!(
        reader.len() >= 4 && &reader.bytes()? == b"GGUF",
        "not a GGUF file: give --model one of a llama"
    );
    let version = reader.u32()?;
    ensure!(
        version == 2 || version == 3,
        "GGUF version {version} is not supported; versions 2 and 3 are",
    );
    Ok(())
}

fn read_tensors<R: Read>(reader: &mut Reader<R>, count: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for _ in 0..count {
        let tensor = Tensor::read(reader)?;
        let name = &tensor.name;
        ensure!(!tensors.contains_key(name), "damaged: tensor {name:?} appears twice");
        tensors.insert(name.clone(), tensor);
    }
    Ok(tensors)
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    let alignment = metadata.integer(ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    // A bound as well: the next multiple of a huge one would overflow.
    ensure!(
        (8..=1 << 20).contains(&alignment) && alignment % 8 == 0,
        "damaged: {ALIGNMENT} is {alignment}",
    );
    Ok(alignment.unsigned_abs())
}
