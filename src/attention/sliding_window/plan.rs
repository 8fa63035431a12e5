//! Which queries are computed together, and over which keys.

use std::ops::Range;

/// Query `i` sees the keys `i + offset − left ≤ j ≤ i + offset + right`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Band {
    query_length: i32,
    key_length: i32,
    left: i32,
    right: i32,
}

impl Band {
    /// The last query stands on the last key. A window longer than both sequences is cut, so that
    /// sums of positions do not overflow.
    pub(super) fn new(query_length: i32, key_length: i32, window_size: i32, causal: bool) -> Self {
        let left = window_size.min(query_length.max(key_length));
        let right = if causal { 0 } else { left };
        Self { query_length, key_length, left, right }
    }

    /// How many keys a query sees that is far from both ends.
    pub(super) fn width(&self) -> i32 {
        self.left + 1 + self.right
    }

    fn offset(&self) -> i32 {
        self.key_length - self.query_length
    }

    /// How many of the first queries come before every key they might see.
    pub(super) fn hidden_rows(&self) -> i32 {
        (-self.offset() - self.right).clamp(0, self.query_length)
    }

    /// The queries whose window is cut by neither end of the keys.
    fn whole_windows(&self) -> Range<i32> {
        let start = (self.left - self.offset()).clamp(self.hidden_rows(), self.query_length);
        start..(self.query_length - self.right).max(start)
    }

    /// These queries and the keys that any of them sees.
    pub(super) fn span(&self, rows: Range<i32>) -> Span {
        let first = rows.start + self.offset() - self.left;
        let last = rows.end - 1 + self.offset() + self.right;
        let keys = first.max(0)..(last + 1).min(self.key_length);
        let lowest = first - keys.start;
        Span { highest: lowest + self.left + self.right, lowest, rows, keys }
    }
}

/// Queries `rows` over `keys`: row `r` of them sees those from `r + lowest` to `r + highest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) rows: Range<i32>,
    pub(super) keys: Range<i32>,
    pub(super) lowest: i32,
    pub(super) highest: i32,
}

impl Span {
    pub(super) fn hides_early_keys(&self) -> bool {
        self.rows.len() as i32 - 1 + self.lowest > 0
    }

    pub(super) fn hides_late_keys(&self) -> bool {
        self.highest < self.keys.len() as i32 - 1
    }

    /// Whether row `r` sees the keys up to `r + S_kv − S_q`, as in causal attention.
    pub(super) fn is_causal(&self) -> bool {
        !self.hides_early_keys() && self.highest == self.keys.len() as i32 - self.rows.len() as i32
    }
}

/// All queries that see anything, in order: some at the start, equal blocks, and what is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) head: Range<i32>,
    /// A multiple of the block, and empty unless there are two: one is part of the tail.
    pub(super) blocks: Range<i32>,
    pub(super) tail: Range<i32>,
}

impl Plan {
    pub(super) fn new(band: &Band, block: i32) -> Self {
        let whole = band.whole_windows();
        let count = whole.len() as i32 / block;
        if count < 2 {
            let start = band.hidden_rows();
            return Self {
                head: start..start,
                blocks: start..start,
                tail: start..band.query_length,
            };
        }
        let blocks = whole.start..whole.start + count * block;
        Self { head: band.hidden_rows()..blocks.start, tail: blocks.end..band.query_length, blocks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(band: Band) -> [(i32, i32); 3] {
        let Plan { head, blocks, tail } = Plan::new(&band, 4);
        [head, blocks, tail].map(|rows| (rows.start, rows.end))
    }

    #[test]
    fn every_query_that_sees_a_key_is_computed_once() {
        for (band, expected) in [
            (Band::new(20, 20, 3, true), [(0, 3), (3, 19), (19, 20)]),
            (Band::new(20, 20, 3, false), [(0, 3), (3, 15), (15, 20)]),
            (Band::new(8, 30, 3, true), [(0, 0), (0, 8), (8, 8)]),
            (Band::new(20, 15, 3, true), [(5, 8), (8, 20), (20, 20)]),
            (Band::new(20, 15, 3, false), [(2, 8), (8, 16), (16, 20)]),
            (Band::new(20, 3, 4, false), [(13, 13), (13, 13), (13, 20)]),
            (Band::new(20, 20, 0, true), [(0, 0), (0, 20), (20, 20)]),
            (Band::new(20, 20, 14, true), [(0, 0), (0, 0), (0, 20)]),
            (Band::new(20, 20, i32::MAX, false), [(0, 0), (0, 0), (0, 20)]),
            (Band::new(1, 20, 3, true), [(0, 0), (0, 0), (0, 1)]),
        ] {
            assert_eq!(plan(band), expected, "{band:?}");
        }
    }

    #[test]
    fn spans_hold_the_keys_that_are_seen() {
        let causal = Band::new(20, 20, 3, true);
        let head = causal.span(0..3);
        assert_eq!((head.keys.clone(), head.is_causal()), (0..3, true));
        let block = causal.span(3..7);
        assert_eq!(block, Span { rows: 3..7, keys: 0..7, lowest: 0, highest: 3 });
        assert!(block.hides_early_keys() && block.hides_late_keys());
        let both = Band::new(20, 20, 3, false);
        assert_eq!(both.span(17..20), Span { rows: 17..20, keys: 14..20, lowest: 0, highest: 6 });
        assert_eq!(both.span(0..2), Span { rows: 0..2, keys: 0..5, lowest: -3, highest: 3 });
        let decode = Band::new(1, 20, 3, true).span(0..1);
        assert_eq!(decode.keys, 16..20);
        assert!(!decode.hides_early_keys() && !decode.hides_late_keys());
        assert!(Band::new(5, 3, 9, true).span(2..5).is_causal());
    }
}
