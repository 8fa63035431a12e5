//! Formulas over arrays as large as a sequence or its scores: on a GPU one pass over memory each, which is most of the time
//! otherwise.

use mlx_rs::{Array, Dtype};

use super::decay::left;
use crate::{
    activation::fused::Fused,
    dispatch::{Context, Target},
    error::Result,
    uploads,
};

/// A formula, computed in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::scan) enum Pass {
    /// Products of queries and keys, times what is left of keys: products, sums of logarithms at queries and at keys, and which
    /// keys are visible.
    Weighed,
    /// An array times another.
    Scaled,
    /// An array, and another times a third.
    Added,
}

thread_local! {
    static FUSED: Fused<(Pass, Dtype)> = Fused::new(formula);
}

impl Pass {
    /// What comes of `inputs`, in `dtype`.
    pub(in crate::scan) fn run(self, dtype: Dtype, inputs: &[Array]) -> Result<Array> {
        let kind = (self, dtype);
        match Context::current()?.target {
            Target::Cpu => formula(kind, inputs),
            Target::Metal | Target::Cuda => FUSED
                .try_with(|fused| fused.call(kind, inputs))
                .unwrap_or_else(|_| formula(kind, inputs)),
        }
    }
}

fn formula((pass, dtype): (Pass, Dtype), inputs: &[Array]) -> Result<Array> {
    let wide = |array: &Array| array.as_dtype(Dtype::Float32);
    let result = match (pass, inputs) {
        (Pass::Weighed, [products, sums, earlier, visible]) => {
            wide(products)?.multiply(left(sums, earlier, visible)?)?
        }
        (Pass::Scaled, [array, factor]) => wide(array)?.multiply(wide(factor)?)?,
        (Pass::Added, [near, far, factor]) => {
            wide(near)?.add(wide(far)?.multiply(wide(factor)?)?)?
        }
        _ => uploads::float(f32::NAN),
    };
    Ok(result.as_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use mlx_rs::ops::tri;

    use super::*;

    #[test]
    fn what_a_gpu_fuses_is_what_a_cpu_computes() -> Result<()> {
        let inputs = |steps: i32, dtype| -> Result<[Array; 4]> {
            let products =
                mlx_rs::random::normal::<f32>(&[2, 3, 1, 1, steps, steps], None, None, None)?;
            let sums = mlx_rs::random::normal::<f32>(&[2, 3, 1, 4, steps, 1], None, None, None)?;
            let (earlier, past) = (sums.swap_axes(-1, -2)?, tri::<bool>(steps, None, None)?);
            Ok([products.as_dtype(dtype)?, sums, earlier, past])
        };
        for (steps, dtype) in [(5, Dtype::Float32), (8, Dtype::Float32), (8, Dtype::Float16)] {
            let inputs = inputs(steps, dtype)?;
            let [products, sums, ..] = &inputs;
            let like = products.multiply(sums)?;
            for (pass, inputs) in [
                (Pass::Weighed, inputs.to_vec()),
                (Pass::Scaled, vec![products.clone(), sums.clone()]),
                (Pass::Added, vec![like, products.clone(), sums.clone()]),
            ] {
                let plain = formula((pass, dtype), &inputs)?;
                let fused = FUSED.with(|fused| fused.call((pass, dtype), &inputs))?;
                let shape = &[2, 3, 1, 4, steps, steps][..];
                assert_eq!((fused.shape(), fused.dtype()), (shape, dtype));
                assert!(
                    fused.all_close(&plain, 1e-3, 1e-5, None)?,
                    "{pass:?} of {steps} {dtype:?}"
                );
            }
        }
        Ok(())
    }
}
