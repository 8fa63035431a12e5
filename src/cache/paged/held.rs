//! The keys of one layer in the blocks of a pool, or its values.

use std::ops::Range;

use mlx_rs::{
    Array, Dtype,
    ops::{
        indexing::{TryIndexOp, scatter_single},
        zeros_dtype,
    },
};

use super::step::PagedStep;
use crate::{
    attention::{BlockForm, in_place},
    dispatch::Context,
    error::Result,
    kernel::Sole,
    layout::Layout,
    rope::Turning,
};

#[derive(Debug, Clone)]
pub(super) struct Held {
    form: BlockForm,
    /// Of what is written and read.
    dtype: Dtype,
    block_size: i32,
    /// Numbers, `[1, SLOTS, H_kv, _]`, and in forms that have some scales, `[1, SLOTS, H_kv]`. Steps write slots, and a sequence
    /// alone attends to a run of them, neither of which then needs another shape.
    arrays: Vec<Array>,
}

impl Held {
    /// Blocks of zeros, `[BLOCKS, BLOCK, H_kv, _]`.
    pub(super) fn zeros(form: BlockForm, shape: [i32; 4], dtype: Dtype) -> Result<Self> {
        let [blocks, block_size, heads, size] = shape;
        let shape = [1, blocks * block_size, heads, size];
        let mut arrays = vec![zeros_dtype(&shape, form.dtype(dtype))?];
        if form.is_scaled() {
            arrays.push(zeros_dtype(&shape[..3], Dtype::Float32)?);
        }
        Ok(Self { form, dtype, block_size, arrays })
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(super) fn form(&self) -> BlockForm {
        self.form
    }

    /// `[BLOCKS, BLOCK, H_kv, _]`.
    pub(super) fn shape(&self) -> [i32; 4] {
        let [_, slots, heads, size] = Layout::Bshd.dims(&self.arrays[0]);
        [slots / self.block_size, self.block_size, heads, size]
    }

    /// `[BLOCKS, BLOCK, H_kv, _]`.
    pub(super) fn blocks(&self) -> Result<Array> {
        self.in_blocks(&self.arrays[0])
    }

    /// `[BLOCKS, BLOCK, H_kv]`.
    pub(super) fn scales(&self) -> Result<Option<Array>> {
        self.arrays.get(1).map(|scales| self.in_blocks(scales)).transpose()
    }

    /// Numbers as they are held, `[1, S, H_kv, _]`, of slots one after another.
    pub(super) fn run(&self, slots: Range<i32>) -> Result<Array> {
        Ok(self.arrays[0].try_index((.., slots))?)
    }

    fn in_blocks(&self, array: &Array) -> Result<Array> {
        let shape = self.shape();
        Ok(array.reshape(&shape[..array.ndim()])?)
    }

    pub(super) fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// What `pick` takes of every array, as numbers.
    pub(super) fn picked(&self, pick: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
        let picked = self.arrays.iter().map(pick).collect::<Result<Vec<_>>>()?;
        self.form.decode(&picked, self.dtype)
    }

    /// The numbers of the first `len` tokens of a sequence with this table, `[1, len, H_kv, _]`.
    pub(super) fn sequence(&self, table: &Array, len: i32) -> Result<Array> {
        self.picked(|array| {
            let blocks = self.in_blocks(array)?.take_axis(table, 0)?;
            Ok(blocks.flatten(0, 1)?.try_index(..len)?.expand_dims(0)?)
        })
    }

    /// Of each array `[C, 1, BLOCK, ..]`: what [`Self::with_copies`] writes over as many blocks.
    pub(super) fn gathered(&self, from: &Array) -> Result<Vec<Array>> {
        let gathered =
            |array: &Array| Ok(self.in_blocks(array)?.take_axis(from, 0)?.expand_dims(1)?);
        self.arrays.iter().map(gathered).collect()
    }

    pub(super) fn with_copies(&self, to: &Array, gathered: Vec<Array>) -> Result<Self> {
        self.with(gathered, |array, copies| {
            let blocks = self.in_blocks(array)?;
            Ok(scatter_single(blocks, to, copies, 0)?.reshape(array.shape())?)
        })
    }

    /// With the tokens of a step, of rows of `[H_kv, _]`.
    pub(super) fn with_tokens(&self, step: &PagedStep, rows: &Array) -> Result<Self> {
        let [.., heads, size] = self.shape();
        let rows = rows.reshape(&[step.rows(), 1, 1, heads, size])?;
        let tokens = self.form.encode(&rows.try_index(..step.token_rows())?)?;
        self.with(tokens, |array, tokens| Ok(scatter_single(array, &step.slots, tokens, 1)?))
    }

    /// MLX writes into the buffers of `self` if nobody holds them any more when the result is evaluated.
    fn with(
        &self,
        parts: Vec<Array>,
        write: impl Fn(&Array, Array) -> Result<Array>,
    ) -> Result<Self> {
        let written = self.arrays.iter().zip(parts).map(|(array, part)| write(array, part));
        Ok(Self { arrays: written.collect::<Result<_>>()?, ..*self })
    }
}

/// Whether a kernel makes a step's copies and writes its tokens where they go.
pub(super) fn can_be_written_in_place(
    context: &Context,
    held: &[Held; 2],
    step: &PagedStep,
) -> bool {
    let refused = in_place::refusal(context, held.each_ref().map(Held::arrays));
    refused.is_none() && !step.copies_overlap
}

/// Makes the copies of a step and writes its tokens where they go, turned if they are to be, and returns their queries,
/// `[T, H, D]`; `rows` are queries, keys and values. [`can_be_written_in_place`] must have said so, and what attends afterwards
/// must take these queries.
pub(super) fn write_in_place(
    rows: [&Array; 3],
    turning: Option<&Turning>,
    step: &PagedStep,
    held: &[Held; 2],
    sole: Sole,
) -> Result<Array> {
    let pools = held.each_ref().map(Held::arrays);
    let slots = match &step.copies {
        Some(copies) => {
            let block_size = step.block_size;
            &in_place::copy(copies.each_ref(), rows[0], &step.slots, pools, block_size, sole)?
        }
        None => &step.slots,
    };
    let turning = turning.map(|turning| (turning, &step.positions));
    in_place::append(rows, turning, slots, pools, sole)
}
