use std::{cell::RefCell, rc::Rc};

use mlx_primitives::{
    Backend, Error,
    quant::{
        QuantizedCompute, QuantizedEmbedding, QuantizedEmbeddingBuilder, QuantizedLinear,
        QuantizedLinearBuilder,
    },
};
use mlx_rs::{
    Array, Device, Dtype,
    builder::Builder,
    module::{Module, ModuleParameters, ModuleParametersExt},
    transforms::{compile::compile, grad},
    with_device,
};

use super::{linear, quantized, unpacked};
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "quantized_linear";
const BOTH: [QuantizedCompute; 2] = [QuantizedCompute::Packed, QuantizedCompute::Dense];

fn layer(compute: QuantizedCompute) -> QuantizedLinearBuilder {
    let weight = quantized([8, 64], 32, 4, Dtype::Float16);
    QuantizedLinearBuilder::new(weight).bias(normal(2, &[8], Dtype::Float32)).compute(compute)
}

fn names(module: &impl ModuleParameters) -> Vec<String> {
    let mut names: Vec<_> =
        module.parameters().flatten().into_keys().map(|name| name.to_string()).collect();
    names.sort();
    names
}

#[test]
fn the_layer_is_the_function_packed_or_dense() {
    for compute in BOTH {
        for dtype in FLOATING {
            for shape in [&[64][..], &[1, 1, 64], &[2, 3, 64], &[0, 64]] {
                let mut layer = layer(compute).build().unwrap();
                let x = normal(1, shape, dtype);
                let bias = Tensor::of(layer.bias.as_ref().as_ref().unwrap());
                let matrix = unpacked(&layer.weight().unwrap());
                let expected = linear(&Tensor::of(&x), &matrix, Some(&bias));
                for call in ["first", "second"] {
                    let y = layer.forward(&x).unwrap();
                    assert_eq!(y.dtype(), dtype);
                    let what = format!("{call} {compute:?} {dtype:?} {shape:?}");
                    assert_close(&what, &y, &expected, Tolerance::on(OP, Backend::Builtin, dtype));
                }
            }
        }
    }
}

#[test]
fn on_a_cpu_a_layer_is_dense_and_says_what_that_costs() {
    with_device(Device::cpu(), || {
        let weight = quantized([8, 64], 32, 4, Dtype::Float16);
        let packed = weight.nbytes();
        let layer = QuantizedLinear::from_weight(weight.clone()).unwrap();
        assert_eq!(layer.compute(), QuantizedCompute::Dense);
        assert_eq!(layer.nbytes().unwrap(), packed + 4 * 8 * 64);
        let head = QuantizedEmbedding::from_weight(weight.clone()).unwrap();
        assert_eq!(head.compute(), QuantizedCompute::Dense);
        assert_eq!(head.nbytes().unwrap(), packed + 4 * 8 * 64);
        let half = QuantizedLinearBuilder::new(weight.clone()).dense_dtype(Dtype::Float16);
        assert_eq!(half.build().unwrap().nbytes().unwrap(), packed + 2 * 8 * 64);
        let lean = QuantizedLinearBuilder::new(weight).compute(QuantizedCompute::Packed);
        assert_eq!(lean.build().unwrap().nbytes().unwrap(), packed);
    });
}

#[test]
fn the_dense_copy_is_made_once_and_is_no_parameter() {
    let mut layer = layer(QuantizedCompute::Dense).build().unwrap();
    let before = layer.dense_copy().unwrap().unwrap().clone();
    before.eval().unwrap();
    layer.forward(&normal(1, &[3, 64], Dtype::Float32)).unwrap().eval().unwrap();
    let after = layer.dense_copy().unwrap().unwrap();
    assert_eq!(before.as_slice::<f32>().as_ptr(), after.as_slice::<f32>().as_ptr());
    assert_eq!(names(&layer), ["bias", "biases", "scales", "weight"]);
    let mut packed = self::layer(QuantizedCompute::Packed).build().unwrap();
    assert!(packed.dense_copy().unwrap().is_none());
}

#[test]
fn a_copy_first_made_under_a_transform_serves_outside_it() {
    let x = normal(1, &[3, 64], Dtype::Float32);
    let expected =
        Tensor::of(&layer(QuantizedCompute::Packed).build().unwrap().forward(&x).unwrap());
    let tolerance = Tolerance::of(OP, Dtype::Float32);
    let layer = Rc::new(RefCell::new(layer(QuantizedCompute::Dense).build().unwrap()));
    let inside = Rc::clone(&layer);
    let mut compiled = compile(move |x: &Array| inside.borrow_mut().forward(x), None);
    assert_close("compiled", &compiled(&x).unwrap(), &expected, tolerance);
    assert_close("compiled again", &compiled(&x).unwrap(), &expected, tolerance);
    assert_close("after", &layer.borrow_mut().forward(&x).unwrap(), &expected, tolerance);
    let fresh = RefCell::new(self::layer(QuantizedCompute::Dense).build().unwrap());
    let loss = |x: &Array| fresh.borrow_mut().forward(x)?.sum(None);
    grad(loss)(&x).unwrap().eval().unwrap();
    assert_close("after grad", &fresh.borrow_mut().forward(&x).unwrap(), &expected, tolerance);
}

#[test]
fn loading_makes_the_dense_copy_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    layer(QuantizedCompute::Dense).build().unwrap().save_safetensors(&path).unwrap();
    let x = normal(1, &[3, 64], Dtype::Float32);
    let expected =
        Tensor::of(&layer(QuantizedCompute::Dense).build().unwrap().forward(&x).unwrap());
    for compute in BOTH {
        let weight = quantized([16, 64], 32, 4, Dtype::Float16).rows(rows(8..16)).unwrap();
        let weight = mlx_primitives::quant::QuantizedWeight::quantize(weight, 32, 4).unwrap();
        let bias = Array::zeros::<f32>(&[8]).unwrap();
        let builder = QuantizedLinearBuilder::new(weight).bias(bias).compute(compute);
        let mut other = builder.build().unwrap();
        let y = other.forward(&x).unwrap();
        assert!(!y.all_close(expected.to_array(Dtype::Float32), None, None, None).unwrap());
        other.load_safetensors(&path).unwrap();
        let what = format!("{compute:?} after loading");
        let tolerance = Tolerance::of(OP, Dtype::Float32);
        assert_close(&what, &other.forward(&x).unwrap(), &expected, tolerance);
    }
}

fn rows(range: std::ops::Range<i32>) -> Array {
    let ids: Vec<_> = range.collect();
    Array::from_slice(&ids, &[ids.len() as i32])
}

#[test]
fn arrays_of_another_format_are_refused_by_the_next_call() {
    let mut layer = layer(QuantizedCompute::Dense).build().unwrap();
    layer.update_flattened([("scales".into(), Array::zeros::<f32>(&[8, 3]).unwrap())].into());
    let error = layer.forward(&normal(1, &[3, 64], Dtype::Float32)).unwrap_err();
    assert!(error.what().contains("[QuantizedWeight] biases must have dtype"), "{error}");
    assert!(layer.nbytes().is_err());
    assert!(layer.dense_copy().is_err());
}

#[test]
fn nothing_trains_but_an_unfrozen_bias() {
    let mut layer = layer(QuantizedCompute::Dense).build().unwrap();
    assert!(layer.trainable_parameters().flatten().is_empty());
    assert_eq!(layer.all_frozen(), Some(true));
    layer.unfreeze_parameters(true);
    let input = normal(5, &[2, 3, 64], Dtype::Float32);
    for compute in BOTH {
        let mut layer = self::layer(compute).build().unwrap();
        layer.unfreeze_parameters(true);
        assert_module(layer, &input, &["bias"]);
    }
}

#[test]
fn the_embedding_looks_up_rows_and_multiplies_by_them() {
    let table = quantized([11, 64], 64, 5, Dtype::Float32);
    let matrix = unpacked(&table);
    for compute in BOTH {
        let builder = QuantizedEmbeddingBuilder::new(table.clone()).compute(compute);
        let mut embedding = builder.build().unwrap();
        assert_eq!(names(&embedding), ["biases", "scales", "weight"]);
        embedding.unfreeze_parameters(true);
        assert!(embedding.trainable_parameters().flatten().is_empty());
        let x = embedding.forward(&Array::from_slice(&[10, 0, 4], &[1, 3])).unwrap();
        let expected = Tensor::from_fn(&[1, 3, 64], |at| matrix.at(&[[10, 0, 4][at[1]], at[2]]));
        let tolerance = Tolerance::of("dequantize", Dtype::Float32);
        assert_close("embedding", &x, &expected, tolerance);
        let logits = embedding.as_linear(&x).unwrap();
        let expected = linear(&Tensor::of(&x), &matrix, None);
        let what = format!("tied head {compute:?}");
        assert_close(&what, &logits, &expected, Tolerance::of(OP, Dtype::Float32));
    }
}

#[test]
fn the_embedding_survives_saving() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.safetensors");
    let table = quantized([11, 64], 64, 4, Dtype::Bfloat16);
    QuantizedEmbedding::from_weight(table.clone()).unwrap().save_safetensors(&path).unwrap();
    let zeros = normal(1, &[11, 64], Dtype::Bfloat16);
    let zeros = mlx_primitives::quant::QuantizedWeight::quantize(zeros, 64, 4).unwrap();
    let mut loaded = QuantizedEmbedding::from_weight(zeros).unwrap();
    loaded.load_safetensors(&path).unwrap();
    let exact = Tolerance::EXACT;
    let expected = Tensor::of(&table.rows(rows(0..11)).unwrap());
    assert_close("loaded table", &loaded.forward(&rows(0..11)).unwrap(), &expected, exact);
}

#[test]
fn the_builders_refuse_what_cannot_be() {
    let weight = quantized([8, 64], 32, 4, Dtype::Float32);
    let builder = || QuantizedLinearBuilder::new(weight.clone());
    let bad = builder().bias(normal(1, &[9], Dtype::Float32)).build();
    assert!(matches!(bad, Err(Error::Shape { argument: "bias", .. })));
    let bad = builder().bias(Array::zeros::<i32>(&[8]).unwrap()).build();
    assert!(matches!(bad, Err(Error::Dtype { argument: "bias", .. })));
    let bad = builder().dense_dtype(Dtype::Int32).build();
    assert!(matches!(bad, Err(Error::Dtype { argument: "dense_dtype", .. })));
    let bad = QuantizedEmbeddingBuilder::new(weight.clone()).dense_dtype(Dtype::Bool).build();
    assert!(matches!(bad, Err(Error::Dtype { argument: "dense_dtype", .. })));
}

#[test]
fn the_modules_refuse_bad_input() {
    let weight = quantized([8, 64], 32, 4, Dtype::Float32);
    let mut embedding = QuantizedEmbedding::from_weight(weight.clone()).unwrap();
    let x = normal(1, &[2, 63], Dtype::Float32);
    assert!(embedding.forward(&x).is_err());
    assert!(embedding.as_linear(&x).is_err());
    for compute in BOTH {
        let mut layer =
            QuantizedLinearBuilder::new(weight.clone()).compute(compute).build().unwrap();
        let error = layer.forward(&x).unwrap_err();
        assert_eq!(error.what(), "[quantized_linear] x must have shape [..., 64] but got [2, 63]");
    }
}
