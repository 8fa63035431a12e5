//! Text as it comes: tokens are bytes, and a character may take several of them.

use std::{
    io::{self, Write},
    str::from_utf8,
};

/// Prints whole characters as soon as their last byte is there.
///
/// What is printed in the end is what [`String::from_utf8_lossy`] makes of all bytes together:
/// bytes that no later one can complete become U+FFFD, and no others do.
pub(crate) struct TextStream<W> {
    output: W,
    text: String,
    pending: Vec<u8>,
}

impl<W: Write> TextStream<W> {
    pub(crate) fn new(output: W) -> Self {
        Self { output, text: String::new(), pending: Vec::new() }
    }

    /// Takes the bytes of one token.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(bytes);
        self.print(self.pending.len() - open_bytes(&self.pending))
    }

    /// Prints what waits for bytes that never came; returns all that was printed.
    pub(crate) fn finish(mut self) -> io::Result<String> {
        self.print(self.pending.len())?;
        Ok(self.text)
    }

    fn print(&mut self, bytes: usize) -> io::Result<()> {
        let ready = self.pending.drain(..bytes).collect::<Vec<_>>();
        let ready = String::from_utf8_lossy(&ready);
        self.text.push_str(&ready);
        self.output.write_all(ready.as_bytes())?;
        self.output.flush()
    }
}

/// How many bytes at the end begin a character that more bytes may complete.
fn open_bytes(bytes: &[u8]) -> usize {
    let tail = bytes.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
    match from_utf8(tail) {
        Err(error) if error.error_len().is_none() => tail.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::TextStream;
    use crate::testing::{Random, model_tokenizer};

    /// What is printed after each piece, and after the end.
    fn printed(pieces: &[&[u8]]) -> Vec<String> {
        let mut stream = TextStream::new(Vec::new());
        let mut steps = Vec::new();
        for piece in pieces {
            stream.push(piece).unwrap();
            assert_eq!(stream.output, stream.text.as_bytes());
            steps.push(stream.text.clone());
        }
        steps.push(stream.finish().unwrap());
        steps
    }

    #[test]
    fn characters_appear_whole() {
        let [a, b] = ["🙂", "中"].map(str::as_bytes);
        assert_eq!(printed(&[b"x", &a[..1], &a[1..3], &a[3..]]), ["x", "x", "x", "x🙂", "x🙂"]);
        assert_eq!(printed(&[&b[..2], &b[2..], b"!"]), ["", "中", "中!", "中!"]);
        assert_eq!(printed(&[&[b, &a[..2]].concat(), &a[2..]]), ["中", "中🙂", "中🙂"]);
        assert_eq!(printed(&[b"", b"a"]), ["", "a", "a"]);
        assert_eq!(printed(&[]), [""]);
    }

    #[test]
    fn bytes_never_completed_become_one_replacement() {
        assert_eq!(printed(&[b"\xf0\x9f"]), ["", "\u{fffd}"]);
        assert_eq!(printed(&[b"\xf0\x9f", b"x"]), ["", "\u{fffd}x", "\u{fffd}x"]);
        assert_eq!(printed(&[b"\xff", b"\x80"])[0], "\u{fffd}", "no byte can follow");
        assert_eq!(printed(&[b"\xe4", b"\xe4\xb8\xad"])[1], "\u{fffd}中");
    }

    #[test]
    fn a_replacement_the_model_wrote_is_printed_at_once() {
        assert_eq!(printed(&["\u{fffd}".as_bytes()])[0], "\u{fffd}");
    }

    #[test]
    fn any_split_prints_the_whole() {
        let alphabet = b"a\x80\xbf\xc3\xe4\xb8\xad\xed\xa0\xf0\x9f\x99\x82\xf4\xff";
        let mut random = Random::new(3);
        for _ in 0..5_000 {
            let length = random.below(12);
            let bytes = (0..length).map(|_| alphabet[random.below(alphabet.len())]);
            let bytes = bytes.collect::<Vec<_>>();
            let (left, right) = bytes.split_at(random.below(length + 1));
            let steps = printed(&[left, right]);
            assert!(steps[1].starts_with(&steps[0]) && steps[2].starts_with(&steps[1]));
            assert_eq!(steps[2], String::from_utf8_lossy(&bytes), "{left:x?} {right:x?}");
        }
    }

    #[test]
    fn real_tokens_split_characters() {
        let Some(tokenizer) = model_tokenizer() else { return };
        let text = "世界 🦜👨‍👩‍👧 ok";
        let tokens = tokenizer.encode(text).unwrap();
        let pieces = tokens.iter().map(|token| tokenizer.bytes(*token)).collect::<Vec<_>>();
        assert!(pieces.iter().any(|piece| str::from_utf8(piece).is_err()), "none is split");
        let steps = printed(&pieces);
        assert!(steps.iter().all(|step| text.starts_with(step)));
        assert_eq!(steps.last().unwrap(), text);
    }
}
