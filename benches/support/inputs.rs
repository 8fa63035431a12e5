//! Seeded inputs.

use mlx_rs::{Array, Dtype, error::Exception, random};

/// Normal values with mean 0 and deviation 1, the same for the same `seed`; made when evaluated.
pub(crate) fn normal(seed: u64, shape: &[i32], dtype: Dtype) -> Result<Array, Exception> {
    let key = random::key(seed)?;
    random::normal::<f32>(shape, None, None, &key)?.as_dtype(dtype)
}
