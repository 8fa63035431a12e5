//! The keys of one layer in the blocks of a pool, or its values.

use mlx_rs::{
    Array, Dtype,
    ops::{
        indexing::{TryIndexOp, scatter_single},
        zeros_dtype,
    },
};

use super::step::PagedStep;
use crate::{attention::BlockForm, error::Result, layout::Layout};

#[derive(Debug, Clone)]
pub(super) struct Held {
    form: BlockForm,
    /// Of what is written and read.
    dtype: Dtype,
    /// Numbers, `[BLOCKS, BLOCK, H_kv, _]`, and in forms that have some scales, `[BLOCKS, BLOCK, H_kv]`.
    arrays: Vec<Array>,
}

impl Held {
    /// Blocks of zeros, `[BLOCKS, BLOCK, H_kv, _]`.
    pub(super) fn zeros(form: BlockForm, shape: [i32; 4], dtype: Dtype) -> Result<Self> {
        let mut arrays = vec![zeros_dtype(&shape, form.dtype(dtype))?];
        if form.is_scaled() {
            arrays.push(zeros_dtype(&shape[..3], Dtype::Float32)?);
        }
        Ok(Self { form, dtype, arrays })
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `[BLOCKS, BLOCK, H_kv, _]`.
    pub(super) fn shape(&self) -> [i32; 4] {
        Layout::Bshd.dims(self.numbers())
    }

    pub(super) fn numbers(&self) -> &Array {
        &self.arrays[0]
    }

    pub(super) fn scales(&self) -> Option<&Array> {
        self.arrays.get(1)
    }

    pub(super) fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// What `pick` takes of every array, as numbers.
    pub(super) fn picked(&self, pick: impl Fn(&Array) -> Result<Array>) -> Result<Array> {
        let picked = self.arrays.iter().map(pick).collect::<Result<Vec<_>>>()?;
        self.form.decode(&picked, self.dtype)
    }

    /// Of each array `[C, 1, BLOCK, ..]`: what [`Self::with_copies`] writes over as many blocks.
    pub(super) fn gathered(&self, from: &Array) -> Result<Vec<Array>> {
        let gathered = |array: &Array| Ok(array.take_axis(from, 0)?.expand_dims(1)?);
        self.arrays.iter().map(gathered).collect()
    }

    pub(super) fn with_copies(self, to: &Array, gathered: Vec<Array>) -> Result<Self> {
        self.with(gathered, |array, blocks| Ok(scatter_single(array, to, blocks, 0)?))
    }

    /// With the tokens of a step, of rows of `[H_kv, _]`.
    pub(super) fn with_tokens(self, step: &PagedStep, rows: &Array) -> Result<Self> {
        let [.., heads, size] = self.shape();
        let rows = rows.reshape(&[step.rows(), 1, heads, size])?;
        let tokens = self.form.encode(&rows.try_index(..step.tokens())?)?;
        self.with(tokens, |array, tokens| {
            let slots = array.flatten(0, 1)?;
            Ok(scatter_single(slots, &step.slots, tokens, 0)?.reshape(array.shape())?)
        })
    }

    /// Each array is held by the next alone, so that MLX writes into the buffer of the first.
    fn with(
        self,
        parts: Vec<Array>,
        write: impl Fn(Array, Array) -> Result<Array>,
    ) -> Result<Self> {
        let written = self.arrays.into_iter().zip(parts).map(|(array, part)| write(array, part));
        Ok(Self { arrays: written.collect::<Result<_>>()?, ..self })
    }
}
