//! Inverses of triangular matrices, by products of matrices.

use mlx_rs::{
    Array,
    ops::{
        concatenate,
        indexing::{Ellipsis, TryIndexOp},
        ones_dtype, zeros_like,
    },
};

use crate::error::Result;

/// The inverse of `I + lower`, where `lower` is `[..., Q, Q]` with zeros on and above the diagonal, `Q` a power of two.
///
/// The inverses of the blocks on the diagonal, one number at first, give those of blocks twice as large:
/// `[[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]]`. A sum of powers of `lower` would take as many products and lose
/// all digits where keys are alike.
pub(super) fn unit_lower_inverse(lower: &Array) -> Result<Array> {
    let shape = lower.shape();
    let (size, before) = (lower.dim(-1), &shape[..shape.len() - 2]);
    let mut inverse = ones_dtype(&[before, &[size, 1, 1]].concat(), lower.dtype())?;
    let mut block = 1;
    while block < size {
        let every = |start: i32| -> Result<Array> {
            let count = inverse.dim(-3);
            let indices = (start..count).step_by(2).collect::<Vec<_>>();
            let indices = Array::from_slice(&indices, &[indices.len() as i32]);
            Ok(inverse.take_axis(&indices, -3)?)
        };
        let (upper, under) = (every(0)?, every(1)?);
        let beside = diagonal_blocks(lower, 2 * block)?;
        let beside = beside.try_index((Ellipsis, block.., ..block))?;
        let left = under.matmul(beside)?.matmul(&upper)?.negative()?;
        let top = concatenate(&[&upper, &zeros_like(&upper)?], -1)?;
        inverse = concatenate(&[top, concatenate(&[left, under], -1)?], -2)?;
        block *= 2;
    }
    Ok(inverse.squeeze_axes(&[-3])?)
}

/// The blocks on the diagonal, `[..., Q / block, block, block]`.
fn diagonal_blocks(matrix: &Array, block: i32) -> Result<Array> {
    let shape = matrix.shape();
    let (count, before) = (matrix.dim(-1) / block, &shape[..shape.len() - 2]);
    let cut = matrix.reshape(&[before, &[count, block, count, block]].concat())?;
    let all = cut.swap_axes(-3, -2)?.reshape(&[before, &[count * count, block, block]].concat())?;
    let indices = (0..count).map(|number| number * (count + 1)).collect::<Vec<_>>();
    Ok(all.take_axis(Array::from_slice(&indices, &[count]), -3)?)
}
