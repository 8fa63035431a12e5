//! The product with an unpacked weight, arranged as the device runs it fastest.

use mlx_rs::{
    Array,
    ops::{concatenate, indexing::TryIndexOp, matmul},
};

use super::Problem;
use crate::{
    dispatch::{Context, Target, beside},
    error::Result,
};

/// `x · Wᵀ` as it is put to MLX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrangement {
    /// `x · Wᵀ`.
    Rows,
    /// `W · x`, for one row: BLAS takes a lone column as a vector, a lone row not always.
    Column,
    /// `x · Wᵢᵀ` for blocks of so many rows of `W`, for one row: BLAS multiplies what is small on
    /// the thread at hand, and streams a large matrix faster so than split among threads.
    Blocks(i32),
}

/// The fewest weights that are worth blocks: 8 MiB in f32, more than a core's cache.
const WORTH_BLOCKS: i64 = 1 << 21;

/// The most weights of a block: from about twice as many on, OpenBLAS takes its way for large ones.
const BLOCK: i64 = 1 << 19;

/// The fewest rows of a block, below which MLX's loop over blocks shows.
const BLOCK_ROWS: i32 = 32;

fn arrange(target: Target, rows: usize, [outputs, inputs]: [i32; 2]) -> Arrangement {
    if rows != 1 || target != Target::Cpu {
        return Arrangement::Rows;
    }
    if i64::from(outputs) * i64::from(inputs) < WORTH_BLOCKS {
        return Arrangement::Column;
    }
    let divides = |size: &i32| outputs % size == 0;
    let largest = BLOCK / i64::from(inputs);
    let sizes = BLOCK_ROWS..=outputs.min(i32::try_from(largest).unwrap_or(i32::MAX));
    sizes.rev().find(divides).map_or(Arrangement::Column, Arrangement::Blocks)
}

/// The product with `matrix`, which is the weight unpacked, in the dtype of `matrix`.
pub(super) fn multiply(matrix: &Array, problem: &Problem) -> Result<Array> {
    let shape @ [outputs, inputs] = problem.weight.shape();
    let x = problem.x.as_dtype(matrix.dtype())?.reshape(&[-1, inputs])?;
    let y = match arrange(Context::current()?.target, problem.rows, shape) {
        Arrangement::Rows => matmul(x, matrix.t())?,
        Arrangement::Column => matmul(matrix, x.reshape(&[inputs])?)?,
        Arrangement::Blocks(size) => {
            let blocks = matrix.reshape(&[outputs / size, size, inputs])?.swap_axes(1, 2)?;
            let (some, rest) = halves(&blocks)?;
            let some = matmul(&x, some)?;
            let rest = beside(&x, &some, || Ok(matmul(&x, rest)?))?;
            concatenate(&[some, rest], 0)?
        }
    };
    problem.finish(&y)
}

fn halves(blocks: &Array) -> Result<(Array, Array)> {
    let half = blocks.dim(0) / 2;
    Ok((blocks.try_index(..half)?, blocks.try_index(half..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_on_a_cpu_is_arranged_by_the_size_of_the_weight() {
        let one = |shape| arrange(Target::Cpu, 1, shape);
        assert_eq!(one([1536, 576]), Arrangement::Column);
        assert_eq!(one([49152, 576]), Arrangement::Blocks(768));
        assert_eq!(one([4096, 4096]), Arrangement::Blocks(128));
        assert_eq!(one([32_003, 4096]), Arrangement::Column, "a prime has no blocks");
        assert_eq!(one([4096, 32_768]), Arrangement::Column, "too wide for blocks");
        assert_eq!(one([i32::MAX, 32]), Arrangement::Column);
    }

    #[test]
    fn everything_else_is_multiplied_as_it_stands() {
        assert_eq!(arrange(Target::Cpu, 2, [49152, 576]), Arrangement::Rows);
        assert_eq!(arrange(Target::Metal, 1, [49152, 576]), Arrangement::Rows);
        assert_eq!(arrange(Target::Cuda, 1, [576, 576]), Arrangement::Rows);
    }
}
