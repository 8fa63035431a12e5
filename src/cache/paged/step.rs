//! What one forward pass needs to know of a pool.

use std::{cell::OnceCell, ops::Range};

use mlx_rs::{Array, ops::indexing::TryIndexOp};

use super::{
    blocks::NONE,
    dense::Dense,
    sequence::{Sequence, SequenceId},
};
use crate::{error::Result, sizes::div_ceil};

/// One forward pass over new tokens of several sequences: a row for each token, one sequence after another.
///
/// The model takes the tokens as `[T, 1]`, each row at its own position. All arrays are parts of one, so that a device
/// gets one.
#[derive(Debug, Clone)]
pub struct PagedStep {
    /// For each token, i32: where it goes.
    pub(super) slots: Array,
    /// `[T]`, u32.
    tokens: Array,
    /// `[T]`, i32.
    pub(super) positions: Array,
    /// `[N, W]`, i32.
    pub(super) block_tables: Array,
    /// `[N]`, i32.
    pub(super) context_lengths: Array,
    /// `[N + 1]`, i32.
    pub(super) query_starts: Array,
    /// From which blocks to which, each `[C]`, i32.
    pub(super) copies: Option<[Array; 2]>,
    /// Whether a block is copied from that is copied to as well.
    pub(super) copies_overlap: bool,
    pub(super) spans: Vec<Span>,
    pub(super) id: StepId,
    /// Those of its pool.
    pub(super) blocks: i32,
    pub(super) block_size: i32,
    /// The slots of all tokens of the one sequence that there is, if they lie one after another.
    pub(super) run: Option<Range<i32>>,
    /// For where no kernel reads blocks; made when it is first needed.
    pub(super) dense: OnceCell<Dense>,
    rows: i32,
    starts: Vec<i32>,
    done: Vec<Done>,
}

/// Which step of which pool it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StepId {
    pub(super) pool: u64,
    pub(super) number: u64,
}

/// The rows of one sequence, for those who go from one sequence to the next.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub(super) rows: Range<i32>,
    pub(super) table: Vec<i32>,
    /// How many tokens there are with those of the rows.
    pub(super) context: i32,
}

/// What will be computed of a sequence.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) id: SequenceId,
    pub(super) cuts: u64,
    pub(super) len: usize,
}

impl PagedStep {
    /// `T`: the tokens of all sequences, and what rows there are besides.
    pub fn rows(&self) -> i32 {
        self.rows
    }

    /// `[T]`, u32: the token of each row, and 0 in rows of no sequence.
    pub fn tokens(&self) -> &Array {
        &self.tokens
    }

    /// `[T]`, i32: the position of each row's token, and 0 in rows of no sequence.
    pub fn positions(&self) -> &Array {
        &self.positions
    }

    /// The rows of sequence `n` are those from number `n` up to the next number.
    pub fn query_starts(&self) -> &[i32] {
        &self.starts
    }

    /// The row of the last token of each sequence, after which comes what the model says next.
    pub fn last_rows(&self) -> Vec<i32> {
        self.starts.iter().skip(1).map(|end| end - 1).collect()
    }

    /// How many of the rows, the first ones, are of sequences.
    pub(crate) fn token_rows(&self) -> i32 {
        self.slots.dim(0)
    }

    pub(super) fn done(&self) -> &[Done] {
        &self.done
    }
}

/// A step in the making.
#[derive(Debug)]
pub(super) struct Plan {
    id: StepId,
    blocks: i32,
    block_size: i32,
    slots: Vec<i32>,
    tokens: Vec<u32>,
    positions: Vec<i32>,
    starts: Vec<i32>,
    spans: Vec<Span>,
    copies: Vec<(i32, i32)>,
    done: Vec<Done>,
}

impl Plan {
    /// Of a pool of so many blocks of so many tokens.
    pub(super) fn new(id: StepId, [blocks, block_size]: [i32; 2], copies: Vec<(i32, i32)>) -> Self {
        let (slots, tokens, positions) = (Vec::new(), Vec::new(), Vec::new());
        let (starts, spans, done) = (vec![0], Vec::new(), Vec::new());
        Self { id, blocks, block_size, slots, tokens, positions, starts, spans, copies, done }
    }

    /// Adds the tokens of a sequence that are in no step yet.
    pub(super) fn push(&mut self, id: SequenceId, sequence: &Sequence) {
        let len = sequence.tokens.len();
        let first = self.slots.len() as i32;
        for position in sequence.scheduled..len {
            self.slots.push(sequence.slot(position, self.block_size as usize));
            self.positions.push(position as i32);
        }
        self.tokens.extend_from_slice(&sequence.tokens[sequence.scheduled..]);
        let end = self.slots.len() as i32;
        let table = sequence.table.clone();
        self.spans.push(Span { rows: first..end, table, context: len as i32 });
        self.starts.push(end);
        self.done.push(Done { id, cuts: sequence.cuts, len });
    }

    /// See [`PagedStep::run`], if there are no rows of no sequence.
    fn run(&self) -> Option<Range<i32>> {
        let [Span { table, context, .. }] = &*self.spans else { return None };
        let used = table.get(..div_ceil(*context, self.block_size) as usize)?;
        let first = *used.first()?;
        let in_a_row = used.iter().zip(first..).all(|(&block, next)| block == next);
        let start = first * self.block_size;
        in_a_row.then_some(start..start + context)
    }

    /// The step, with rows of no sequence up to `rows`.
    pub(super) fn upload(mut self, rows: usize) -> Result<PagedStep> {
        let count = rows.max(self.slots.len());
        let run = self.run().filter(|_| count == self.slots.len());
        self.positions.resize(count, 0);
        self.tokens.resize(count, 0);
        let width = self.spans.iter().map(|span| span.table.len()).max().unwrap_or_default();
        let mut parts = Parts::default();
        let slots = parts.add(self.slots.iter().copied());
        let tokens = parts.add(self.tokens.iter().map(|token| token.cast_signed()));
        let positions = parts.add(self.positions.iter().copied());
        let tables = parts.add(self.spans.iter().flat_map(|span| {
            let beyond = std::iter::repeat_n(NONE, width - span.table.len());
            span.table.iter().copied().chain(beyond)
        }));
        let lengths = parts.add(self.spans.iter().map(|span| span.context));
        let starts = parts.add(self.starts.iter().copied());
        let from = parts.add(self.copies.iter().map(|copy| copy.0));
        let to = parts.add(self.copies.iter().map(|copy| copy.1));

        let all = parts.upload();
        let part = |range: &Range<i32>| all.try_index(range.clone());
        let copies = match self.copies.is_empty() {
            true => None,
            false => Some([part(&from)?, part(&to)?]),
        };
        let overlaps = |(_, to): &(i32, i32)| self.copies.iter().any(|(from, _)| from == to);
        let copies_overlap = self.copies.iter().any(overlaps);
        Ok(PagedStep {
            slots: part(&slots)?,
            tokens: part(&tokens)?.view::<u32>()?,
            positions: part(&positions)?,
            block_tables: part(&tables)?.reshape(&[self.spans.len() as i32, width as i32])?,
            context_lengths: part(&lengths)?,
            query_starts: part(&starts)?,
            copies,
            copies_overlap,
            spans: self.spans,
            id: self.id,
            blocks: self.blocks,
            block_size: self.block_size,
            run,
            dense: OnceCell::new(),
            rows: count as i32,
            starts: self.starts,
            done: self.done,
        })
    }
}

/// Numbers that go to the device as one array.
#[derive(Debug, Default)]
struct Parts(Vec<i32>);

impl Parts {
    fn add(&mut self, numbers: impl Iterator<Item = i32>) -> Range<i32> {
        let first = self.0.len() as i32;
        self.0.extend(numbers);
        first..self.0.len() as i32
    }

    fn upload(&self) -> Array {
        Array::from_slice(&self.0, &[self.0.len() as i32])
    }
}
