//! Which position lies in which slot, where the first ones stay and the others go round.

use std::ops::Range;

/// Slots for the first positions, and after them a ring for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ring {
    pub(super) sinks: i32,
    /// Of the ring alone.
    pub(super) size: i32,
}

impl Ring {
    pub(super) fn slots(self) -> i32 {
        self.sinks + self.size
    }

    fn slot(self, position: i32) -> i32 {
        match position < self.sinks {
            true => position,
            false => self.sinks + (position - self.sinks) % self.size,
        }
    }

    /// Which of these positions go where: a slot, and the positions that lie from there on. What would be overwritten at
    /// once is left out.
    pub(super) fn writes(self, positions: Range<i32>) -> Vec<(i32, Range<i32>)> {
        let Range { start, end } = positions;
        let first = start..end.min(self.sinks);
        let last = start.max(self.sinks).max(end.saturating_sub(self.size))..end;
        let runs = [first, last].into_iter().flat_map(|run| self.runs(run));
        runs.map(|run| (self.slot(run.start), run)).collect()
    }

    /// The slots of the sinks, and of these positions after them, in order, where `end` positions are written.
    pub(super) fn reads(self, end: i32, positions: Range<i32>) -> Vec<Range<i32>> {
        let runs = [0..end.min(self.sinks), positions].into_iter().flat_map(|run| self.runs(run));
        let mut slots: Vec<Range<i32>> = Vec::new();
        for run in runs {
            let first = self.slot(run.start);
            let run = first..first + run.len() as i32;
            match slots.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => slots.push(run),
            }
        }
        slots
    }

    /// The position in each slot that was written, where `end` positions are.
    pub(super) fn positions(self, end: i32) -> Vec<i32> {
        let mut positions: Vec<_> = (0..end.min(self.slots())).collect();
        for position in self.slots().max(end.saturating_sub(self.size))..end {
            positions[self.slot(position) as usize] = position;
        }
        positions
    }

    /// A run of positions as runs of slots, of which there are two where it goes round.
    fn runs(self, run: Range<i32>) -> Vec<Range<i32>> {
        if run.is_empty() {
            return Vec::new();
        }
        let to_end = self.slots() - self.slot(run.start);
        let turn = run.start.saturating_add(to_end).min(run.end);
        [run.start..turn, turn..run.end].into_iter().filter(|run| !run.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: Ring = Ring { sinks: 2, size: 4 };

    #[test]
    fn sinks_stay_and_the_others_go_round() {
        assert_eq!(RING.positions(3), [0, 1, 2]);
        assert_eq!(RING.positions(6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(RING.positions(8), [0, 1, 6, 7, 4, 5]);
        assert_eq!(RING.positions(101), [0, 1, 98, 99, 100, 97]);
    }

    #[test]
    fn only_what_stays_is_written() {
        assert_eq!(RING.writes(0..1), [(0, 0..1)]);
        assert_eq!(RING.writes(0..5), [(0, 0..2), (2, 2..5)]);
        assert_eq!(RING.writes(5..8), [(5, 5..6), (2, 6..8)]);
        assert_eq!(RING.writes(1..20), [(1, 1..2), (4, 16..18), (2, 18..20)]);
        assert_eq!(RING.writes(7..7), []);
    }

    #[test]
    fn what_is_read_is_in_order() {
        let reads = |end, positions| -> Vec<i32> {
            RING.reads(end, positions).into_iter().flatten().collect()
        };
        assert_eq!(reads(5, 2..5), [0, 1, 2, 3, 4]);
        assert_eq!(RING.reads(8, 4..8), [0..2, 4..6, 2..4]);
        assert_eq!(reads(8, 6..8), [0, 1, 2, 3]);
        assert_eq!(reads(1, 2..2), [0]);
    }
}
