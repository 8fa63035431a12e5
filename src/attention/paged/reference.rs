//! The definition, in plain MLX ops, with all keys of each query's sequence side by side.

use mlx_rs::{
    Array, Dtype,
    ops::{
        arange, broadcast_to, indexing::TryIndexOp, logaddexp, logsumexp_axis, maximum, minimum,
        select, sigmoid, tanh,
    },
    stop_gradient,
};

use super::{
    BlockForm,
    problem::{Operands, Rule},
};
use crate::{error::Result, uploads};

/// `[T, H, D_v]` of the dtype of the queries, and `[T, H]`, f32.
pub(super) fn attend(operands: &Operands<&Array>, rule: &Rule) -> Result<[Array; 2]> {
    let place = Place::new(operands)?;
    let [key_form, value_form] = rule.forms;
    let keys = place.gathered(operands, operands.keys, operands.key_scales, key_form)?;
    let values = place.gathered(operands, operands.values, operands.value_scales, value_form)?;
    let scores = scores(operands, &keys, &place, rule)?;

    let visible = place.visible(rule)?.expand_dims(1)?;
    let seen = visible.any_axis(-1, true)?;
    let shown = visible.logical_or(seen.logical_not()?)?;
    let scores = select(shown, scores, uploads::float(f32::NEG_INFINITY))?;
    let sums = logsumexp_axis(&scores, -1, true)?;
    let weights = scores.subtract(&sums)?.exp()?;
    let output = by_group(&weights, &values)?;
    let (output, lse, empty) = if rule.sinks {
        let sinks = operands.sinks.as_dtype(Dtype::Float32)?.reshape(&[1, -1, 1])?;
        let share = sigmoid(sums.subtract(&sinks)?)?;
        (output.multiply(share)?, logaddexp(&sums, &sinks)?, sinks)
    } else {
        (output, sums, uploads::float(f32::NEG_INFINITY))
    };
    let output = select(&seen, output, uploads::float(0.0))?;
    let lse = select(&seen, lse, empty)?;
    Ok([output.as_dtype(operands.queries.dtype())?, lse.squeeze_axes(&[-1])?])
}

/// Where each query stands, all `[T]`.
struct Place {
    /// Its sequence; some one where it has none.
    sequence: Array,
    /// The key beside it.
    beside: Array,
    /// Keys of its sequence.
    keys: Array,
    /// `[S]`: every key that a table has room for.
    key: Array,
}

impl Place {
    fn new(operands: &Operands<&Array>) -> Result<Self> {
        let (starts, lengths) = (stop_gradient(operands.starts)?, stop_gradient(operands.lengths)?);
        let sequences = lengths.dim(0);
        let query = arange::<i32, i32>(None, operands.queries.dim(0), None)?;
        let ends = starts.try_index(1..)?;
        let passed =
            query.expand_dims(-1)?.ge(&ends)?.as_dtype(Dtype::Int32)?.sum_axis(-1, false)?;
        let known = passed.lt(uploads::int(sequences))?;
        let sequence = clamped(&passed, sequences - 1)?;

        let most = operands.tables.dim(1) * operands.keys.dim(1);
        let keys = clamped(&lengths.take_axis(&sequence, 0)?, most)?;
        let keys = select(&known, keys, uploads::int(0))?;
        let beside = query.subtract(ends.take_axis(&sequence, 0)?)?.add(&keys)?;
        Ok(Self { sequence, beside, keys, key: arange::<i32, i32>(None, most, None)? })
    }

    /// `[T, H_kv, S, _]`, f32: the numbers in the blocks of each query's sequence, and zeros beyond its keys.
    fn gathered(
        &self,
        operands: &Operands<&Array>,
        blocks: &Array,
        scales: &Array,
        form: BlockForm,
    ) -> Result<Array> {
        let tables = stop_gradient(operands.tables)?.take_axis(&self.sequence, 0)?;
        let blocks_in = self.in_order(blocks, &tables, form.numbers(blocks)?)?;
        let numbers = if form.is_scaled() {
            let scales = scales.expand_dims(-1)?;
            let shape = [blocks.dim(0), blocks.dim(1), blocks.dim(2), 1];
            let scales = broadcast_to(scales, &shape)?;
            blocks_in.multiply(self.in_order(blocks, &tables, scales)?)?
        } else {
            blocks_in
        };
        let real = self.key.lt(self.keys.expand_dims(-1)?)?;
        let real = real.reshape(&[real.dim(0), -1, 1, 1])?;
        Ok(select(real, numbers, uploads::float(0.0))?.swap_axes(1, 2)?)
    }

    /// `[T, S, H_kv, _]` of `numbers`, `[BLOCKS, BLOCK, H_kv, _]`.
    fn in_order(&self, blocks: &Array, tables: &Array, numbers: Array) -> Result<Array> {
        let tables = clamped(tables, blocks.dim(0) - 1)?;
        Ok(numbers.take_axis(tables, 0)?.flatten(1, 2)?)
    }

    /// `[T, S]`.
    fn visible(&self, rule: &Rule) -> Result<Array> {
        let beside = self.beside.expand_dims(-1)?;
        let mut visible = self.key.lt(self.keys.expand_dims(-1)?)?;
        if let Some(left) = rule.window.left {
            let first = beside.subtract(uploads::int(left.min(FAR)))?;
            visible = visible.logical_and(self.key.ge(first)?)?;
        }
        if let Some(right) = rule.window.right {
            let last = beside.add(uploads::int(right.min(FAR)))?;
            visible = visible.logical_and(self.key.le(last)?)?;
        }
        Ok(visible)
    }
}

/// Beyond every key, and with room to add to it.
const FAR: i32 = 1 << 30;

/// `[T, H, S]`, f32, of keys that a query may see and keys that it may not.
fn scores(operands: &Operands<&Array>, keys: &Array, place: &Place, rule: &Rule) -> Result<Array> {
    let queries = operands.queries.as_dtype(Dtype::Float32)?;
    let products = by_group(&queries, &keys.swap_axes(-1, -2)?)?;
    let mut scores = products.multiply(uploads::float(rule.scale))?;
    if let Some(cap) = rule.soft_cap.map(uploads::float) {
        scores = tanh(scores.divide(&cap)?)?.multiply(&cap)?;
    }
    if rule.alibi {
        let slopes = operands.slopes.as_dtype(Dtype::Float32)?.reshape(&[1, -1, 1])?;
        let distance = place.key.subtract(place.beside.expand_dims(-1)?)?.abs()?;
        let distance = distance.as_dtype(Dtype::Float32)?.expand_dims(1)?;
        scores = scores.subtract(slopes.multiply(distance)?)?;
    }
    Ok(scores)
}

/// Multiplies each head of `[T, H, _]` by its group's matrix in `[T, H_kv, ..]`.
fn by_group(heads: &Array, groups: &Array) -> Result<Array> {
    let (shape, count) = (heads.shape(), groups.dim(1));
    let grouped = heads.reshape(&[shape[0], count, shape[1] / count, shape[2]])?;
    Ok(grouped.matmul(groups)?.flatten(1, 2)?)
}

/// Numbers from 0 to `most`.
fn clamped(numbers: &Array, most: i32) -> Result<Array> {
    Ok(maximum(minimum(numbers, uploads::int(most))?, uploads::int(0))?)
}
