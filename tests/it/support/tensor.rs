//! What oracles compute on: f64 values in row-major order. MLX is met at the border only, in
//! `of` and `to_array`.

use mlx_rs::{Array, Dtype};

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Tensor {
    pub(crate) fn new(shape: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{shape:?}");
        Self { shape: shape.to_vec(), values }
    }

    pub(crate) fn from_fn(shape: &[usize], mut value: impl FnMut(&[usize]) -> f64) -> Self {
        let count = shape.iter().product();
        let values = (0..count).map(|flat| value(&unravel(flat, shape))).collect();
        Self::new(shape, values)
    }

    /// The values an array really holds, after any rounding to its dtype.
    pub(crate) fn of(array: &Array) -> Self {
        let shape: Vec<_> = array.shape().iter().map(|&size| size as usize).collect();
        let values = if array.size() == 0 {
            Vec::new()
        } else {
            array.contiguous().unwrap().to_vec_cast::<f32>().unwrap()
        };
        Self::new(&shape, values.into_iter().map(f64::from).collect())
    }

    pub(crate) fn to_array(&self, dtype: Dtype) -> Array {
        let shape: Vec<_> = self.shape.iter().map(|&size| size as i32).collect();
        let values: Vec<_> = self.values.iter().map(|&value| value as f32).collect();
        Array::from_slice(&values, &shape).as_dtype(dtype).unwrap()
    }

    pub(crate) fn at(&self, index: &[usize]) -> f64 {
        self.values[ravel(index, &self.shape)]
    }

    /// The size of the last axis, and the rows along it.
    pub(crate) fn rows(&self) -> std::slice::Chunks<'_, f64> {
        self.values.chunks(*self.shape.last().unwrap())
    }
}

pub(crate) fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        index[axis] = flat % shape[axis];
        flat /= shape[axis];
    }
    index
}

fn ravel(index: &[usize], shape: &[usize]) -> usize {
    assert_eq!(index.len(), shape.len());
    index.iter().zip(shape).fold(0, |flat, (&i, &size)| {
        assert!(i < size, "{index:?} in {shape:?}");
        flat * size + i
    })
}
