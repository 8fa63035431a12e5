//! The tensors of a GGUF file: names, shapes, storage types and places, no data.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};

use super::reader::Reader;

/// How ggml stores weights: `bytes` for every `weights` of a row.
#[derive(Debug, PartialEq)]
pub(super) struct Storage {
    id: u32,
    name: &'static str,
    weights: u64,
    bytes: u64,
}

const fn storage(id: u32, name: &'static str, weights: u64, bytes: u64) -> Storage {
    Storage { id, name, weights, bytes }
}

/// What MLX loads. It keeps the first two as they are and the next three packed; the others
/// become f16.
const LOADABLE: [Storage; 7] = [
    storage(0, "F32", 1, 4),
    storage(1, "F16", 1, 2),
    storage(2, "Q4_0", 32, 18),
    storage(3, "Q4_1", 32, 20),
    storage(8, "Q8_0", 32, 34),
    storage(14, "Q6_K", 256, 210),
    storage(30, "BF16", 1, 2),
];

/// What else files in the wild hold, for the error that names it. MLX refuses most of these, gives
/// half of the groups of Q4_K the scale of their neighbours, and silently ends its list of tensors
/// at the types it has no number for.
const REFUSED: [(u32, &str); 21] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// One tensor as the header announces it.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// Rows first, as MLX has it; GGUF writes the reverse.
    pub(super) shape: Vec<u64>,
    /// From the start of the data section.
    offset: u64,
    bytes: u64,
}

impl Tensor {
    /// The least a tensor takes in the header: name length, rank, one dimension, type, offset.
    pub(super) const MIN_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

    pub(super) fn read<R: Read>(reader: &mut Reader<R>) -> Result<Self> {
        let name = reader.string()?;
        let shape = shape(reader).with_context(|| format!("tensor {name:?}"))?;
        let storage = find_storage(reader.u32()?).with_context(|| format!("tensor {name:?}"))?;
        let bytes = size(&shape, storage).with_context(|| format!("tensor {name:?}"))?;
        Ok(Self { name, shape, offset: reader.u64()?, bytes })
    }

    /// Refuses a tensor that does not lie between `data_start` and the end of the file.
    pub(super) fn check_place(&self, data_start: u64, alignment: u64, len: u64) -> Result<()> {
        let Self { name, offset, .. } = self;
        ensure!(
            offset % alignment == 0,
            "damaged: tensor {name:?} begins at {offset}, off the alignment of {alignment}",
        );
        let start = data_start.checked_add(*offset);
        let Some(end) = start.and_then(|start| start.checked_add(self.bytes)) else {
            bail!("damaged: tensor {name:?} begins at {offset}, beyond any file");
        };
        ensure!(
            end <= len,
            "truncated: tensor {name:?} ends at byte {end}, but the file has {len}; \
             download it again",
        );
        Ok(())
    }
}

fn shape<R: Read>(reader: &mut Reader<R>) -> Result<Vec<u64>> {
    let rank = reader.u32()?;
    // Four is ggml's limit; MLX aborts the process at nine.
    ensure!((1..=4).contains(&rank), "damaged: {rank} dimensions");
    let mut shape = (0..rank).map(|_| reader.u64()).collect::<Result<Vec<_>>>()?;
    let fits = |dim: &u64| (1..=i32::MAX as u64).contains(dim);
    ensure!(shape.iter().all(fits), "damaged: dimensions {shape:?}");
    shape.reverse();
    Ok(shape)
}

fn find_storage(id: u32) -> Result<&'static Storage> {
    if let Some(storage) = LOADABLE.iter().find(|storage| storage.id == id) {
        return Ok(storage);
    }
    match REFUSED.iter().find(|(refused, _)| *refused == id) {
        Some((_, name)) => {
            bail!(
                "stored as {name}, which MLX refuses or misreads; use a file in F16, Q8_0, Q4_0 or Q4_1"
            )
        }
        None => bail!("stored as type {id}, which is not known here"),
    }
}

fn size(shape: &[u64], storage: &Storage) -> Result<u64> {
    let Storage { name, weights, bytes, .. } = storage;
    let columns = shape.last().copied().unwrap_or(1);
    ensure!(
        columns % weights == 0,
        "damaged: rows of {columns} are not made of {name} blocks of {weights}",
    );
    let total = shape.iter().try_fold(1_u64, |total, dim| total.checked_mul(*dim));
    let size = total.and_then(|total| (total / weights).checked_mul(*bytes));
    size.with_context(|| format!("damaged: dimensions {shape:?}"))
}
