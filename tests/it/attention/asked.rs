//! A case with its arrays, or with what the oracle reads of them.

use mlx_primitives::attention::{FlashAttentionOptions, Segments, Window};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, full_like, indexing::TryIndexOp},
};

use super::{
    cases::{Case, MaskOf, Sizes, SlopesOf},
    oracle::{Mask, Rule, attend},
};
use crate::support::{
    sample::{normal, strided},
    tensor::Tensor,
};

/// What a call reads and may have a gradient with respect to.
#[derive(Clone)]
pub(crate) struct Asked<T> {
    /// `[B, S, H, D]`.
    pub(crate) inputs: [T; 3],
    pub(crate) mask: Option<T>,
    pub(crate) slopes: Option<T>,
    pub(crate) sinks: Option<T>,
}

impl<T: Clone> Asked<T> {
    /// In one list.
    pub(crate) fn list(&self) -> Vec<T> {
        let options = [&self.mask, &self.slopes, &self.sinks].into_iter().flatten();
        self.inputs.iter().chain(options).cloned().collect()
    }

    /// Takes another list apart in the same way.
    pub(crate) fn with(&self, list: &[T]) -> Self {
        let mut rest = list.iter().cloned();
        let mut next = || rest.next().unwrap();
        Self {
            inputs: [next(), next(), next()],
            mask: self.mask.as_ref().map(|_| next()),
            slopes: self.slopes.as_ref().map(|_| next()),
            sinks: self.sinks.as_ref().map(|_| next()),
        }
    }
}

impl Asked<Array> {
    pub(crate) fn new(case: &Case, dtype: Dtype) -> Self {
        let Sizes([batch, heads, ..]) = case.sizes;
        // Of the size of a model's, at most a half: distances must not drown the products.
        let slopes = |slopes| {
            let shape = if slopes == SlopesOf::Heads { &[heads][..] } else { &[batch, heads] };
            normal(4, shape, Dtype::Float32).multiply(Array::from_f32(0.2)).unwrap()
        };
        let sinks = |about: f64| {
            let about = Array::from_f32(about as f32);
            normal(5, &[heads], Dtype::Float32).add(about).unwrap().as_dtype(dtype).unwrap()
        };
        Self {
            inputs: inputs(case, dtype),
            mask: case.mask.map(MaskOf::array),
            slopes: case.slopes.map(slopes),
            sinks: case.sinks.map(sinks),
        }
    }

    pub(crate) fn options<'a>(
        &'a self,
        case: &Case,
        segments: &'a Option<[Array; 2]>,
    ) -> FlashAttentionOptions<'a> {
        FlashAttentionOptions {
            scale: case.scale,
            soft_cap: case.soft_cap,
            alibi_slopes: self.slopes.as_ref(),
            mask: self.mask.as_ref(),
            causal: case.causal,
            window: Window { left: case.left, right: case.right },
            segments: segments.as_ref().map(|[queries, keys]| Segments { queries, keys }),
            sinks: self.sinks.as_ref(),
            ..Default::default()
        }
    }

    /// As the operation reads it: an additive mask has the dtype of the queries.
    pub(crate) fn tensors(&self) -> Asked<Tensor> {
        let dtype = self.inputs[0].dtype();
        let mask = |mask: &Array| match mask.dtype() {
            Dtype::Bool => Tensor::of(mask),
            _ => Tensor::of(&mask.as_dtype(dtype).unwrap()),
        };
        Asked {
            inputs: self.inputs.each_ref().map(Tensor::of),
            mask: self.mask.as_ref().map(mask),
            slopes: self.slopes.as_ref().map(Tensor::of),
            sinks: self.sinks.as_ref().map(Tensor::of),
        }
    }
}

impl Asked<Tensor> {
    /// Result and log-sum-exp, with each weight multiplied by `kept`.
    pub(crate) fn expected(&self, case: &Case, kept: Option<&Tensor>) -> (Tensor, Tensor) {
        let Sizes([.., size, _]) = case.sizes;
        let mask = match (&self.mask, case.mask) {
            (None, _) => Mask::None,
            (Some(mask), Some(of)) if of.is_boolean() => Mask::Boolean(mask),
            (Some(mask), _) => Mask::Additive(mask),
        };
        let rule = Rule {
            scale: case.scale.map_or(1.0 / f64::from(size).sqrt(), f64::from),
            soft_cap: case.soft_cap.map(f64::from),
            slopes: self.slopes.as_ref(),
            mask,
            causal: case.causal,
            left: case.left,
            right: case.right,
            segments: case.segments,
            sinks: self.sinks.as_ref(),
            kept,
        };
        let [queries, keys, values] = &self.inputs;
        attend(queries, keys, values, rule)
    }
}

pub(crate) fn segments(case: &Case) -> Option<[Array; 2]> {
    let array = |bounds: &[i32]| Array::from_slice(bounds, &[bounds.len() as i32]);
    case.segments.map(|bounds| bounds.map(array))
}

pub(crate) fn inputs(case: &Case, dtype: Dtype) -> [Array; 3] {
    let sizes = case.sizes;
    let queries = normal(1, &sizes.queries(), dtype);
    let keys = normal(2, &sizes.keys(), dtype);
    let values = normal(3, &sizes.values(), dtype);
    match case.strided {
        true => [strided(&queries), in_cache(&keys), in_cache(&values)],
        false => [queries, keys, values],
    }
}

/// The same values as the middle of a longer buffer whose other slots are unwritten.
fn in_cache(array: &Array) -> Array {
    let unwritten = full_like(array, Array::from_f32(f32::NAN), array.dtype()).unwrap();
    let buffer = concatenate(&[&unwritten, array, &unwritten], 1).unwrap();
    buffer.eval().unwrap();
    let length = array.shape()[1];
    buffer.try_index((.., length..2 * length, .., ..)).unwrap()
}
