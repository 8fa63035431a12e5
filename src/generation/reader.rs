//! A model with the keys and values of what it has read.

use mlx_rs::{
    Array,
    ops::concatenate,
    transforms::{async_eval, eval},
};

use super::model::CausalModel;
use crate::{
    attention::KvCache,
    cache::{PagedKv, PagedKvOptions, PagedLayer, PagedStep},
    check::{Check, axes},
    error::Result,
    ffi::synchronize,
    kernel::Sole,
    uploads,
};

const CHECK: Check = Check::op("CausalModel");

pub(super) struct Reader<M> {
    model: M,
    /// None where they could not be made.
    kvs: Option<Vec<PagedKv>>,
}

impl<M: CausalModel> Reader<M> {
    /// Without caches, until it gets some.
    pub(super) fn new(model: M) -> Self {
        Self { model, kvs: None }
    }

    /// Takes empty caches of these sizes in place of any that it has.
    pub(super) fn reset(&mut self, kvs: &[PagedKvOptions]) -> Result<()> {
        self.kvs = None;
        // What a failed step has left underway may hold the old ones.
        synchronize()?;
        // SAFETY: the caches are made here, and none of their arrays leaves them. What attends to them takes what a kernel
        // passes on. A step is handed over when the one before has ended, or awaits its tokens.
        let promise = unsafe { Sole::promise() };
        let kv = |options| Ok(PagedKv::new(options)?.sole(promise));
        self.kvs = Some(kvs.iter().map(kv).collect::<Result<_>>()?);
        self.settle([])
    }

    pub(super) fn vocabulary(&self) -> i32 {
        self.model.vocabulary()
    }

    /// What the model says of each row, `[T, 1, dims]`.
    pub(super) fn read(
        &mut self,
        step: &PagedStep,
        awaited: Option<&AwaitedTokens>,
    ) -> Result<Array> {
        let expected = "have been made anew since a step failed";
        let kvs = CHECK.known(self.kvs.as_mut(), "caches", expected, "none")?;
        let copies = kvs.iter_mut().map(|kv| kv.gather(step)).collect::<Result<Vec<_>>>()?;
        eval(copies.iter().flatten())?;
        let tokens = tokens(step, awaited)?;
        let mut layers = kvs.iter_mut().map(|kv| kv.layer(step)).collect::<Vec<PagedLayer>>();
        let mut caches =
            layers.iter_mut().map(|layer| layer as &mut dyn KvCache).collect::<Vec<_>>();
        Ok(self.model.hidden(&tokens, &mut caches)?)
    }

    /// The logits after some of the rows, `[R, V]`.
    pub(super) fn logits(&mut self, hidden: &Array, rows: &[i32]) -> Result<Array> {
        let count = rows.len() as i32;
        let logits = self.model.logits(&of_rows(hidden, rows)?)?;
        CHECK.shape("logits", &logits, axes![count, 1, self.model.vocabulary()])?;
        Ok(logits.squeeze_axes(&[1])?)
    }

    /// Evaluates these arrays, and what the step wrote.
    pub(super) fn settle<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        Ok(eval(arrays.into_iter().chain(self.written()))?)
    }

    /// Hands these arrays to the device, and what the step wrote.
    pub(super) fn submit<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<()> {
        Ok(async_eval(arrays.into_iter().chain(self.written()))?)
    }

    /// Whether the step that was read last writes all its tokens where they go, whatever else is underway.
    pub(super) fn reads_in_place(&self) -> bool {
        self.kvs.iter().flatten().all(PagedKv::was_written_in_place)
    }

    fn written(&self) -> impl Iterator<Item = &Array> {
        self.kvs.iter().flatten().flat_map(PagedKv::arrays)
    }
}

/// Some of the rows of an array, or all as they are.
pub(super) fn of_rows(array: &Array, rows: &[i32]) -> Result<Array> {
    match rows.iter().copied().eq(0..array.dim(0)) {
        true => Ok(array.clone()),
        false => Ok(array.take_axis(uploads::integers(rows.to_vec()), 0)?),
    }
}

/// Tokens of a step that the one underway draws.
pub(super) struct AwaitedTokens<'a> {
    /// All that it draws, `[R]`, u32.
    pub(super) drawn: &'a Array,
    /// The rows of the step that await one, in order, each with the place of its own among those.
    pub(super) rows: Vec<(i32, i32)>,
}

/// The tokens of a step, `[T, 1]`; some or other in rows of no sequence.
fn tokens(step: &PagedStep, awaited: Option<&AwaitedTokens>) -> Result<Array> {
    let tokens = match awaited {
        None => step.tokens().clone(),
        Some(awaited) => awaited.with_those_of(step)?,
    };
    Ok(tokens.expand_dims(1)?)
}

impl AwaitedTokens<'_> {
    /// `[T]`: these, and what the step has in its other rows; where all tokens are awaited, some of these in rows of no sequence.
    fn with_those_of(&self, step: &PagedStep) -> Result<Array> {
        let (first, count) = (self.drawn.dim(0), step.rows());
        let (from, mut order) = if self.rows.len() as i32 == step.token_rows() {
            (self.drawn.clone(), vec![0; count.unsigned_abs() as usize])
        } else {
            let both = concatenate(&[self.drawn, step.tokens()], 0)?;
            (both, (first..first + count).collect::<Vec<_>>())
        };
        self.rows.iter().for_each(|&(row, place)| order[row as usize] = place);
        of_rows(&from, &order)
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::{Dtype, error::Exception};

    use super::*;
    use crate::{
        attention::BlockForm,
        cache::{PagedPool, PagedPoolOptions},
        generation::LayerKv,
    };

    /// A step that reads these tokens, each of another sequence.
    fn step(own: &[u32], rows: usize) -> Result<PagedStep> {
        let mut pool = PagedPool::new(PagedPoolOptions::new(16))?;
        let open = |&token| {
            let sequence = pool.open(&[], b"")?;
            pool.append(sequence, &[token])?;
            Ok(sequence)
        };
        let sequences = own.iter().map(open).collect::<Result<Vec<_>>>()?;
        pool.step(&sequences, rows)
    }

    /// A model of one layer that nothing should ask.
    struct Silent;

    impl CausalModel for Silent {
        fn vocabulary(&self) -> i32 {
            4
        }

        fn layers(&self) -> Vec<LayerKv> {
            Vec::new()
        }

        fn hidden(
            &mut self,
            _: &Array,
            _: &mut [&mut dyn KvCache],
        ) -> std::result::Result<Array, Exception> {
            Err(Exception::custom("it was asked"))
        }

        fn logits(&mut self, _: &Array) -> std::result::Result<Array, Exception> {
            Err(Exception::custom("it was asked"))
        }
    }

    #[test]
    fn nothing_is_read_without_caches() -> Result<()> {
        let mut reader = Reader::new(Silent);
        let refused = |reader: &mut Reader<Silent>| -> Result<String> {
            let read = reader.read(&step(&[1], 1)?, None);
            Ok(read.map_or_else(|error| error.to_string(), |_| "read".to_owned()))
        };
        let lost = "[CausalModel] caches must have been made anew since a step failed but got none";
        assert_eq!(refused(&mut reader)?, lost);
        let kv = PagedKvOptions {
            blocks: 16,
            block_size: 16,
            num_kv_heads: 1,
            head_dim: 8,
            value_dim: None,
            dtype: Dtype::Float32,
            keys: BlockForm::Plain,
            values: BlockForm::Plain,
        };
        reader.reset(std::slice::from_ref(&kv))?;
        assert!(refused(&mut reader)?.contains("it was asked"));
        let none = PagedKvOptions { head_dim: 0, ..kv };
        assert!(reader.reset(&[none]).is_err());
        assert_eq!(refused(&mut reader)?, lost);
        Ok(())
    }

    #[test]
    fn awaited_tokens_stand_among_those_of_the_step() -> Result<()> {
        let drawn = Array::from_slice(&[10_u32, 11, 12], &[3]);
        let read = |own: &[u32], awaited: &[(i32, i32)], rows| -> Result<Vec<u32>> {
            let awaited = AwaitedTokens { drawn: &drawn, rows: awaited.to_vec() };
            let tokens = tokens(&step(own, rows)?, Some(&awaited))?;
            assert_eq!(tokens.shape(), [rows as i32, 1]);
            Ok(tokens.flatten(None, None)?.as_slice::<u32>()[..own.len()].to_vec())
        };
        const A: u32 = u32::MAX;
        assert_eq!(read(&[A, A, A], &[(0, 0), (1, 1), (2, 2)], 3)?, [10, 11, 12]);
        assert_eq!(read(&[A, A, A], &[(0, 2), (1, 0), (2, 1)], 3)?, [12, 10, 11]);
        assert_eq!(read(&[A, A, A], &[(0, 0), (1, 1), (2, 2)], 4)?, [10, 11, 12]);
        assert_eq!(read(&[A, A], &[(0, 0), (1, 1)], 2)?, [10, 11]);
        assert_eq!(read(&[7, A, 8, 9, A], &[(1, 2), (4, 0)], 8)?, [7, 12, 8, 9, 10]);
        let own = tokens(&step(&[5, 6], 4)?, None)?;
        assert_eq!(own.as_slice::<u32>(), [5, 6, 0, 0]);
        Ok(())
    }
}
