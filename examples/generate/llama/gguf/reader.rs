//! Reads from a file that may lie about its lengths.

use std::io::Read;

use anyhow::{Result, bail, ensure};

/// No string is longer and no list has more items: the largest real vocabularies stay far below.
const MAX_LENGTH: u64 = 1 << 24;

/// A cursor that checks every length against what is left of the file before it reads.
pub(super) struct Reader<R> {
    input: R,
    position: u64,
    len: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R, len: u64) -> Self {
        Self { input, position: 0, len }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.check_left(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.position += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// The number of items that follow, each of `item_bytes` or more.
    pub(super) fn count(&mut self, item_bytes: u64) -> Result<u64> {
        let position = self.position;
        let count = self.u64()?;
        ensure!(count <= MAX_LENGTH, "damaged: a length of {count} at byte {position}");
        self.check_left(count * item_bytes)?;
        Ok(count)
    }

    pub(super) fn string(&mut self) -> Result<String> {
        let count = self.count(1)?;
        let mut bytes = Vec::new();
        self.input.by_ref().take(count).read_to_end(&mut bytes)?;
        let start = self.position;
        self.position += count;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => bail!("damaged: the string at byte {start} is not UTF-8"),
        }
    }

    fn check_left(&self, bytes: u64) -> Result<()> {
        let Self { position, len, .. } = *self;
        ensure!(
            bytes <= len - position,
            "truncated or damaged: the header asks for {bytes} bytes at byte {position}, \
             but the file has {len}; download it again",
        );
        Ok(())
    }
}
