#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use mlx_rs::random;

use super::*;

const MODES: [QuantMode; 4] =
    [QuantMode::Affine, QuantMode::Mxfp4, QuantMode::Mxfp8, QuantMode::Nvfp4];

/// Every format of the affine mode, and the one format of each other.
fn formats() -> Vec<QuantFormat> {
    let mut formats = Vec::new();
    for mode in MODES {
        for &group_size in mode.group_sizes() {
            for &bits in mode.bits() {
                formats.push(QuantFormat::new(mode, group_size, bits).unwrap());
            }
        }
    }
    formats
}

fn normal(shape: &[i32], seed: u64) -> Array {
    let key = random::key(seed).unwrap();
    random::normal::<f32>(shape, None, None, &key).unwrap()
}

fn values(array: &Array) -> Vec<f32> {
    let flat = array.as_dtype(Dtype::Float32).unwrap().flatten(None, None).unwrap();
    flat.as_slice::<f32>().to_vec()
}

/// The largest difference between `restored` and the weights of a group with this minimum and maximum.
fn bound(format: QuantFormat, min: f32, max: f32) -> f32 {
    let largest = min.abs().max(max.abs());
    match format.mode() {
        // One step, for the bias is rounded to a whole number of them.
        QuantMode::Affine => (max - min) / ((1 << format.bits()) - 1) as f32,
        // The scale is the nearest power of two, up to sqrt(2) too small, so that the largest is cut off.
        QuantMode::Mxfp4 | QuantMode::Mxfp8 => largest * (1.0 - 0.5_f32.sqrt()),
        // Half of the largest gap between values, 4 to 6, of 6; and the rounding of the scale to three bits.
        QuantMode::Nvfp4 => largest * (1.0 / 6.0 + 1.0 / 16.0),
    }
}

#[test]
fn every_format_restores_weights_within_its_error() {
    let weight = normal(&[8, 256], 1);
    for format in formats() {
        let packed = quantize(&weight, format).unwrap();
        assert_eq!(packed.weight.shape(), [8, 256 * format.bits() / 32], "{format:?}");
        assert_eq!(packed.scales.shape(), [8, 256 / format.group_size()], "{format:?}");
        assert_eq!(packed.biases.is_some(), format.mode() == QuantMode::Affine);
        let restored = dequantize(packed.as_ref(), format, Dtype::Float32).unwrap();
        assert_eq!(restored.dtype(), Dtype::Float32);
        let size = usize::try_from(format.group_size()).unwrap();
        let (weight, restored) = (values(&weight), values(&restored));
        for (group, restored) in weight.chunks(size).zip(restored.chunks(size)) {
            let min = group.iter().copied().fold(f32::INFINITY, f32::min);
            let max = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let bound = bound(format, min, max) * 1.0001;
            for (x, y) in group.iter().zip(restored) {
                assert!((x - y).abs() <= bound, "{format:?}: {x} became {y}, bound {bound}");
            }
        }
    }
}

#[test]
fn more_bits_restore_weights_better() {
    let weight = normal(&[32, 256], 2);
    let error = |format: QuantFormat| -> f32 {
        let packed = quantize(&weight, format).unwrap();
        let restored = dequantize(packed.as_ref(), format, Dtype::Float32).unwrap();
        let squares = restored.subtract(&weight).unwrap().square().unwrap();
        squares.mean(None).unwrap().item_exact::<f32>().sqrt()
    };
    let affine = [2, 3, 4, 5, 6, 8]
        .map(|bits| error(QuantFormat::new(QuantMode::Affine, 32, bits).unwrap()));
    assert!(affine.is_sorted_by(|a, b| a > b), "{affine:?}");
    let [_, mxfp4, mxfp8, nvfp4] = MODES.map(|mode| error(mode.into()));
    assert!(mxfp8 < nvfp4 && nvfp4 < mxfp4 && mxfp4 < 0.2, "{mxfp8} {nvfp4} {mxfp4}");
    assert!(mxfp8 < 0.05, "{mxfp8}");
}

#[test]
fn weights_that_a_format_can_hold_are_restored_exactly() {
    let cycle = [0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0_f32];
    let weight: Vec<f32> = cycle.iter().copied().cycle().take(2 * 64).collect();
    let weight = Array::from_slice(&weight, &[2, 64]);
    for mode in [QuantMode::Mxfp4, QuantMode::Nvfp4] {
        let packed = quantize(&weight, mode.into()).unwrap();
        let restored = dequantize(packed.as_ref(), mode.into(), Dtype::Float32).unwrap();
        assert_eq!(values(&restored), values(&weight), "{mode:?}");
    }
    let weight: Vec<f32> = (0..16_u8).map(f32::from).cycle().take(2 * 64).collect();
    let weight = Array::from_slice(&weight, &[2, 64]);
    let packed = quantize(&weight, QuantFormat::default()).unwrap();
    let restored = dequantize(packed.as_ref(), QuantFormat::default(), None).unwrap();
    assert_eq!(values(&restored), values(&weight));
}

#[test]
fn the_type_of_restored_weights_may_be_chosen() {
    let weight = normal(&[2, 64], 3).as_dtype(Dtype::Float16).unwrap();
    for mode in MODES {
        let packed = quantize(&weight, mode.into()).unwrap();
        let dtype = |dtype: Option<Dtype>| {
            dequantize(packed.as_ref(), mode.into(), dtype).map(|w| w.dtype())
        };
        let own = if mode == QuantMode::Affine { Dtype::Float16 } else { Dtype::Bfloat16 };
        assert_eq!(dtype(None).unwrap(), own, "{mode:?}");
        for wanted in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            assert_eq!(dtype(Some(wanted)).unwrap(), wanted, "{mode:?}");
        }
        assert!(dtype(Some(Dtype::Int32)).is_err());
        assert!(dtype(Some(Dtype::Float64)).is_err());
    }
}

fn assert_product(x: &Array, weight: &Array, transpose: bool, format: QuantFormat, tolerance: f64) {
    let packed = quantize(weight, format).unwrap();
    let product = quantized_matmul(x, packed.as_ref(), transpose, format).unwrap();
    let mut restored = dequantize(packed.as_ref(), format, Dtype::Float32).unwrap();
    if transpose {
        restored = restored.swap_axes(-1, -2).unwrap();
    }
    let x = x.as_dtype(Dtype::Float32).unwrap();
    let expected = x.matmul(&restored).unwrap();
    assert_eq!(product.shape(), expected.shape(), "{format:?}");
    let product = product.as_dtype(Dtype::Float32).unwrap();
    let close = product.all_close(&expected, tolerance, tolerance, None).unwrap();
    assert!(close, "{format:?} {:?} {transpose}", x.shape());
}

#[test]
fn the_product_is_that_with_the_restored_weights() {
    let weight = normal(&[96, 128], 4);
    for format in formats() {
        for rows in [1, 3, 33] {
            assert_product(&normal(&[rows, 128], 5), &weight, true, format, 1e-4);
        }
        assert_product(&normal(&[3, 96], 6), &weight, false, format, 1e-4);
        assert_product(&normal(&[128], 7), &weight, true, format, 1e-4);
        assert_product(&normal(&[2, 3, 128], 8), &weight, true, format, 1e-4);
    }
}

#[test]
fn the_product_takes_stacks_of_weights() {
    for mode in MODES {
        let weight = normal(&[2, 32, 64], 9);
        assert_product(&normal(&[2, 5, 64], 10), &weight, true, mode.into(), 1e-4);
        assert_product(&normal(&[3, 1, 5, 64], 11), &weight, true, mode.into(), 1e-4);
    }
}

#[test]
fn the_product_takes_half_precision_and_strides() {
    for mode in MODES {
        for dtype in [Dtype::Float16, Dtype::Bfloat16] {
            let weight = normal(&[32, 128], 12).as_dtype(dtype).unwrap();
            let x = normal(&[4, 128], 13).as_dtype(dtype).unwrap();
            let packed = quantize(&weight, mode.into()).unwrap();
            let product = quantized_matmul(&x, packed.as_ref(), true, mode.into()).unwrap();
            assert_eq!(product.dtype(), dtype, "{mode:?}");
            assert_product(&x, &weight, true, mode.into(), 0.3);
        }
        let strided = normal(&[128, 4], 14).swap_axes(0, 1).unwrap();
        let weight = normal(&[128, 32], 15).swap_axes(0, 1).unwrap();
        assert_product(&strided, &weight, true, mode.into(), 1e-4);
    }
}

#[test]
fn the_product_of_no_rows_has_none() {
    for mode in MODES {
        let packed = quantize(&normal(&[32, 64], 16), mode.into()).unwrap();
        let x = zeros_dtype(&[2, 0, 64], Dtype::Float16).unwrap();
        let product = quantized_matmul(&x, packed.as_ref(), true, mode.into()).unwrap();
        assert_eq!(product.shape(), [2, 0, 32]);
        product.eval().unwrap();
    }
}

fn text<T>(result: Result<T>) -> String {
    result.err().map(|error| error.what().to_owned()).unwrap_or_default()
}

#[test]
fn a_mode_has_the_sizes_it_has() {
    for mode in MODES {
        let format = QuantFormat::new(mode, None, None).unwrap();
        assert_eq!(format, mode.into());
        assert_eq!((format.group_size(), format.bits()), (mode.group_sizes()[0], mode.bits()[0]));
        for wrong in [i32::MIN, -1, 0, 7, i32::MAX] {
            assert!(QuantFormat::new(mode, wrong, None).is_err());
            assert!(QuantFormat::new(mode, None, wrong).is_err());
        }
    }
    assert_eq!(
        text(QuantFormat::new(QuantMode::Mxfp4, 64, None)),
        "[quantize] group_size must be one of [32] for mxfp4 but got 64"
    );
}

#[test]
fn what_mlx_cannot_quantize_is_an_error() {
    for mode in MODES {
        let of = |array: &Array| text(quantize(array, mode.into()));
        assert!(of(&Array::from_slice(&[1; 64], &[1, 64])).contains("must be f32, f16 or bf16"));
        assert!(of(&normal(&[2, 64], 1).as_dtype(Dtype::Float64).unwrap()).contains("must be f32"));
        assert!(of(&zeros_dtype(&[0, 64], Dtype::Float32).unwrap()).contains("must not be empty"));
        assert!(of(&zeros_dtype(&[2, 0], Dtype::Float32).unwrap()).contains("must not be empty"));
        assert!(of(&normal(&[2, 40], 1)).contains("needs to be divisible"));
        assert!(of(&normal(&[64], 1)).contains("at least 2 dimension"));
    }
}

#[test]
fn parts_that_do_not_fit_are_errors() {
    for mode in MODES {
        let format = QuantFormat::from(mode);
        let packed = quantize(&normal(&[32, 64], 1), format).unwrap();
        let other = quantize(&normal(&[16, 64], 1), format).unwrap();
        let flat = quantize(&normal(&[1, 64], 1), format).unwrap();
        let float = normal(&[32, 64], 1);
        let good = packed.as_ref();
        let x = normal(&[2, 64], 2);
        let both = |packed: Packed<&Array>, part: &str| {
            for text in [
                text(dequantize(packed, format, None)),
                text(quantized_matmul(&x, packed, true, format)),
            ] {
                assert!(text.contains(&format!("] {part} must")), "{mode:?}: {text:?}");
            }
        };
        let weight = flat.weight.flatten(None, None).unwrap();
        both(Packed { weight: &weight, ..good }, "weight");
        both(Packed { weight: &float, ..good }, "weight");
        both(Packed { scales: &other.scales, ..good }, "scales");
        both(Packed { scales: &Array::from_int(1), ..good }, "scales");
        let biases = if mode == QuantMode::Affine { None } else { Some(good.scales) };
        both(Packed { biases, ..good }, "biases");
        let scales = &good.scales.as_dtype(Dtype::Int32).unwrap();
        let part = if mode == QuantMode::Affine { "scales and biases" } else { "scales" };
        both(Packed { scales, ..good }, part);

        let product = |x: &Array| text(quantized_matmul(x, good, true, format));
        assert!(product(&normal(&[2, 32], 1)).contains("[quantized_matmul]"));
        assert!(product(&Array::from_f32(1.0)).contains("at least one axis"));
        assert!(product(&Array::from_slice(&[1; 64], &[1, 64])).contains("must be f32"));
        let stack = quantize(&normal(&[2, 32, 64], 1), format).unwrap();
        let error = text(quantized_matmul(&x, stack.as_ref(), true, format));
        assert!(error.contains("at least three axes"), "{error}");
    }
}
