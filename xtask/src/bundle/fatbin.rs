//! Blanks the GPU code of a library that other generations of GPUs need.
//!
//! Section `.nv_fatbin` is a row of blocks, each one source file's code in many forms:
//!
//! ```text
//! block: u32 magic, u16 version, u16 header size, u64 size of the entries, then the entries
//! entry: u16 kind, u16, u32 header size, u64 payload size, u32, u32, u16, u16, u32 architecture, ...
//! ```
//!
//! All little-endian. Headers stay as they are, so the loader sees what it saw; only payloads that
//! it will not choose become zeros, which compress to nothing.
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use object::{Object as _, ObjectSection as _};

const MAGIC: u32 = 0xBA55_ED50;
/// The kind of an entry that holds machine code, not PTX.
const MACHINE_CODE: u16 = 2;
/// The bytes of an entry's header that are read here.
const ENTRY_HEADER: usize = 32;

/// Keeps in the shared `library` only the machine code that a GPU of generation `arch` runs.
///
/// Returns the generation it is for: the highest of the same major version up to `arch`.
pub(super) fn keep_only(library: &mut [u8], arch: u32) -> Result<u32> {
    let range = section(library)?;
    let section = library.get_mut(range).context(".nv_fatbin lies outside the file")?;
    let entries = entries(section)?;
    let kept = choose(&entries, arch)?;
    for entry in entries.iter().filter(|entry| !entry.is_code_for(kept)) {
        section[entry.payload.clone()].fill(0);
    }
    Ok(kept)
}

fn section(library: &[u8]) -> Result<Range<usize>> {
    let file = object::File::parse(library).context("no ELF file")?;
    let section = file.section_by_name(".nv_fatbin").context("no section .nv_fatbin")?;
    let (start, size) = section.file_range().context(".nv_fatbin is empty")?;
    span(usize::try_from(start)?, size)
}

#[derive(Debug, PartialEq)]
struct Entry {
    kind: u16,
    arch: u32,
    payload: Range<usize>,
}

impl Entry {
    fn is_code_for(&self, arch: u32) -> bool {
        self.kind == MACHINE_CODE && self.arch == arch
    }
}

fn choose(entries: &[Entry], wanted: u32) -> Result<u32> {
    let code = entries.iter().filter(|entry| entry.kind == MACHINE_CODE);
    let mut archs: Vec<_> = code.map(|entry| entry.arch).collect();
    archs.sort_unstable();
    archs.dedup();
    // A GPU runs the code of lower minor versions of its own major version.
    let runs = |arch: &&u32| **arch / 10 == wanted / 10 && **arch <= wanted;
    archs.iter().rev().find(runs).copied().with_context(|| {
        let all: Vec<_> = archs.iter().map(|arch| format!("sm_{arch}")).collect();
        format!("MLX has no code for sm_{wanted}, only for {}", all.join(" "))
    })
}

/// All entries of all blocks of `section`, their payloads within it.
fn entries(section: &[u8]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < section.len() {
        at = if is_padding(section, at) {
            at + 8
        } else {
            block(section, at, &mut entries).with_context(|| format!(".nv_fatbin at {at:#x}"))?
        };
    }
    Ok(entries)
}

fn is_padding(section: &[u8], at: usize) -> bool {
    section[at..].iter().take(8).all(|byte| *byte == 0)
}

/// Reads the block at `at` and returns where it ends.
fn block(section: &[u8], at: usize, entries: &mut Vec<Entry>) -> Result<usize> {
    let magic = u32::from_le_bytes(field(section, at)?);
    let version = u16::from_le_bytes(field(section, at + 4)?);
    let header = u16::from_le_bytes(field(section, at + 6)?);
    ensure!(magic == MAGIC, "a block must start with {MAGIC:#x} but has {magic:#x}");
    ensure!(version == 1 && header == 16, "unknown block version {version}, header {header}");
    let size = u64::from_le_bytes(field(section, at + 8)?);
    let body = span(at + usize::from(header), size)?;
    let block = section.get(..body.end).context("a block is cut off")?;
    let mut at = body.start;
    while at < body.end {
        let entry = entry(block, at)?;
        at = entry.payload.end;
        entries.push(entry);
    }
    Ok(body.end)
}

/// Reads the entry at `at` of a block that ends with `block`.
fn entry(block: &[u8], at: usize) -> Result<Entry> {
    let header = usize::try_from(u32::from_le_bytes(field(block, at + 4)?))?;
    if header < ENTRY_HEADER {
        bail!("an entry's header must have {ENTRY_HEADER} bytes but has {header}");
    }
    let size = u64::from_le_bytes(field(block, at + 8)?);
    let payload = span(at.checked_add(header).context("an entry is too long")?, size)?;
    ensure!(payload.end <= block.len(), "an entry is cut off");
    Ok(Entry {
        kind: u16::from_le_bytes(field(block, at)?),
        arch: u32::from_le_bytes(field(block, at + 28)?),
        payload,
    })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().context("a header is cut off")
}

fn span(start: usize, size: u64) -> Result<Range<usize>> {
    let end = start.checked_add(usize::try_from(size)?).context("a size is too large")?;
    Ok(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry_bytes(kind: u16, arch: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(257_u16.to_le_bytes());
        bytes.extend(64_u32.to_le_bytes());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.resize(28, 0xAA);
        bytes.extend(arch.to_le_bytes());
        bytes.resize(64, 0xBB);
        bytes.extend(payload);
        bytes
    }

    fn block_bytes(entries: &[Vec<u8>]) -> Vec<u8> {
        let body = entries.concat();
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(16_u16.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn sample() -> Vec<u8> {
        let first = [entry_bytes(2, 80, b"eighty!!"), entry_bytes(2, 90, b"ninety!!")];
        let second = [entry_bytes(1, 90, b"ptx of 90"), entry_bytes(2, 90, b"more!!!")];
        [block_bytes(&first), vec![0; 8], block_bytes(&second)].concat()
    }

    #[test]
    fn entries_of_all_blocks_are_found() -> Result<()> {
        let section = sample();
        let found = entries(&section)?;
        let text = |entry: &Entry| String::from_utf8_lossy(&section[entry.payload.clone()]).into();
        let texts: Vec<String> = found.iter().map(text).collect();
        assert_eq!(texts, ["eighty!!", "ninety!!", "ptx of 90", "more!!!"]);
        let kept: Vec<_> = found.iter().map(|entry| entry.is_code_for(90)).collect();
        assert_eq!(kept, [false, true, false, true]);
        Ok(())
    }

    #[test]
    fn code_of_the_same_major_version_is_chosen() -> Result<()> {
        let found = entries(&sample())?;
        assert_eq!(choose(&found, 90)?, 90);
        assert_eq!(choose(&found, 89)?, 80);
        let told = choose(&found, 120).map_err(|error| error.to_string());
        assert_eq!(told, Err("MLX has no code for sm_120, only for sm_80 sm_90".into()));
        Ok(())
    }

    #[test]
    fn cut_sections_are_errors() {
        let whole = block_bytes(&[entry_bytes(2, 90, b"ninety!!")]);
        for length in 1..whole.len() {
            assert!(entries(&whole[..length]).is_err(), "cut at {length}");
        }
        assert_eq!(entries(&[]).ok(), Some(Vec::new()));
    }

    #[test]
    fn damaged_headers_are_errors_or_skipped_never_panics() {
        let whole = sample();
        for at in 0..whole.len() {
            for value in [0, 1, 0x7F, 0xFF] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                if let Ok(entries) = entries(&damaged) {
                    assert!(entries.iter().all(|entry| entry.payload.end <= damaged.len()));
                }
            }
        }
        assert!(entries(&[0xFF; 64]).is_err());
        assert!(keep_only(&mut [0xFF; 64], 90).is_err());
    }
}
