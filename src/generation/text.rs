//! Text from tokens: whole characters, and never more than a stop string leaves.

use std::str::from_utf8;

/// The bytes of tokens: the part of a tokenizer that an engine needs to find stop strings.
pub trait Detokenizer: Send + Sync {
    /// The bytes that a token stands for; none for one that is no text.
    fn bytes(&self, token: u32) -> Vec<u8>;
}

impl<F: Fn(u32) -> Vec<u8> + Send + Sync> Detokenizer for F {
    fn bytes(&self, token: u32) -> Vec<u8> {
        self(token)
    }
}

/// Makes whole characters of bytes that come in pieces.
///
/// All together they are what [`String::from_utf8_lossy`] makes of all bytes: bytes that no later one can complete become
/// U+FFFD, and no others do.
///
/// # Example
/// ```
/// use mlx_primitives::generation::TextStream;
///
/// let mut stream = TextStream::default();
/// let [first, rest] = ["é".as_bytes()[..1].to_vec(), "é".as_bytes()[1..].to_vec()];
/// assert_eq!(stream.push(&first), "");
/// assert_eq!(stream.push(&rest), "é");
/// assert_eq!(stream.finish(), "");
/// ```
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    pending: Vec<u8>,
}

impl TextStream {
    /// The characters that these bytes complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        self.take(self.pending.len() - open_bytes(&self.pending))
    }

    /// What is left of bytes that never came whole.
    pub fn finish(&mut self) -> String {
        self.take(self.pending.len())
    }

    fn take(&mut self, bytes: usize) -> String {
        let ready = self.pending.drain(..bytes).collect::<Vec<_>>();
        String::from_utf8_lossy(&ready).into_owned()
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

/// Finds the first of some strings in a text that comes in pieces, and holds back what may be the beginning of one.
#[derive(Debug, Clone)]
pub(super) struct StopFinder {
    stops: Vec<String>,
    /// Whether the text ends with the string that was found, or before it.
    included: bool,
    held: String,
}

/// What may be shown after a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) text: String,
    /// The string that was found, after which nothing comes.
    pub(super) stop: Option<String>,
}

impl StopFinder {
    pub(super) fn new(stops: Vec<String>, included: bool) -> Self {
        Self { stops, included, held: String::new() }
    }

    pub(super) fn push(&mut self, piece: &str) -> Shown {
        self.held.push_str(piece);
        if let Some((start, stop)) = self.first() {
            let end = if self.included { start + stop.len() } else { start };
            let text = self.held[..end].to_owned();
            self.held.clear();
            return Shown { text, stop: Some(stop) };
        }
        let kept = self.held.len() - self.open();
        Shown { text: self.held.drain(..kept).collect(), stop: None }
    }

    /// What was held back in vain.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string that begins first, and of several the longest.
    fn first(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop)));
        let first = found.min_by_key(|(start, stop)| (*start, std::cmp::Reverse(stop.len())));
        first.map(|(start, stop)| (start, stop.clone()))
    }

    /// How many bytes at the end may be the beginning of a stop string.
    fn open(&self) -> usize {
        let open = |stop: &String| {
            let mut ends = stop.char_indices().map(|(end, _)| end).rev();
            ends.find(|&end| self.held.ends_with(&stop[..end])).unwrap_or(0)
        };
        self.stops.iter().map(open).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splitmix::scramble;

    /// What is shown after each piece, and after the end; and what was found.
    fn shown(stops: &[&str], included: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut finder = StopFinder::new(stops, included);
        let mut texts = Vec::new();
        for piece in pieces {
            let Shown { text, stop } = finder.push(piece);
            texts.push(text);
            if stop.is_some() {
                return (texts, stop);
            }
        }
        texts.push(finder.finish());
        (texts, None)
    }

    #[test]
    fn a_stop_is_found_across_pieces_and_never_shown_in_part() {
        let (texts, stop) = shown(&["END"], false, &["a E", "N", "D b"]);
        assert_eq!(
            (texts, stop.as_deref()),
            (vec!["a ".into(), "".into(), "".into()], Some("END"))
        );
        let (texts, stop) = shown(&["END"], true, &["a E", "ND b"]);
        assert_eq!((texts.concat(), stop.as_deref()), ("a END".to_owned(), Some("END")));
    }

    #[test]
    fn what_only_began_like_a_stop_is_shown_later() {
        let (texts, stop) = shown(&["END", "ENTER"], false, &["E", "N", "T", "x", "EN"]);
        assert_eq!(texts, ["", "", "", "ENTx", "", "EN"]);
        assert_eq!(stop, None);
    }

    #[test]
    fn the_stop_that_begins_first_counts_and_of_several_the_longest() {
        assert_eq!(shown(&["b", "ab"], false, &["xab"]).1.as_deref(), Some("ab"));
        assert_eq!(shown(&["a", "ab"], false, &["xab"]).1.as_deref(), Some("ab"));
        assert_eq!(shown(&["aab"], false, &["a", "a", "a", "b"]).0.concat(), "a");
    }

    #[test]
    fn characters_are_not_cut() {
        let (texts, stop) = shown(&["é!"], false, &["é", "é", "!"]);
        assert_eq!((texts.concat(), stop.as_deref()), ("é".to_owned(), Some("é!")));
    }

    /// All text after each piece, and after the end.
    fn printed(pieces: &[&[u8]]) -> Vec<String> {
        let (mut stream, mut text) = (TextStream::default(), String::new());
        let mut steps = Vec::new();
        for piece in pieces {
            text += &stream.push(piece);
            steps.push(text.clone());
        }
        steps.push(text + &stream.finish());
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
        let mut state = 3;
        let mut random = |bound: usize| {
            state += 1;
            (scramble(state) % bound as u64) as usize
        };
        for _ in 0..5_000 {
            let length = random(12);
            let bytes = (0..length).map(|_| alphabet[random(alphabet.len())]);
            let bytes = bytes.collect::<Vec<_>>();
            let (left, right) = bytes.split_at(random(length + 1));
            let steps = printed(&[left, right]);
            assert!(steps[1].starts_with(&steps[0]) && steps[2].starts_with(&steps[1]));
            assert_eq!(steps[2], String::from_utf8_lossy(&bytes), "{left:x?} {right:x?}");
        }
    }
}
