use mlx_primitives::quant::QuantizedWeight;
use mlx_rs::{Array, Dtype, ops::broadcast_to};

use super::{quantized, unpacked};
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    sample::normal,
    tensor::Tensor,
};

const OP: &str = "dequantize";

fn formats() -> impl Iterator<Item = (i32, i32)> {
    let bits = QuantizedWeight::BITS;
    QuantizedWeight::GROUP_SIZES.into_iter().flat_map(move |size| bits.map(|bits| (size, bits)))
}

fn message<T>(result: mlx_primitives::Result<T>) -> String {
    result.err().unwrap().to_string()
}

#[test]
fn every_format_unpacks_as_the_oracle_does() {
    for (group_size, bits) in formats() {
        for dtype in FLOATING {
            let weight = quantized([5, 2 * group_size], group_size, bits, dtype);
            let expected = unpacked(&weight);
            for result in FLOATING {
                let what = format!("{OP} {bits} bits of {group_size}, {dtype:?} to {result:?}");
                let got = weight.dequantize(result).unwrap();
                assert_eq!(got.dtype(), result, "{what}");
                assert_close(&what, &got, &expected, Tolerance::of(OP, result));
            }
        }
    }
}

#[test]
fn quantizing_rounds_to_the_nearest_level() {
    for (group_size, bits) in formats() {
        let matrix = normal(9, &[5, 2 * group_size], Dtype::Float32);
        let weight = QuantizedWeight::quantize(&matrix, group_size, bits).unwrap();
        assert_eq!(weight.shape(), [5, 2 * group_size]);
        let (original, rounded) = (Tensor::of(&matrix), unpacked(&weight));
        let scales = Tensor::of(weight.scales());
        for (flat, (a, b)) in original.values.iter().zip(&rounded.values).enumerate() {
            // MLX shifts the scale so that 0 is a level, which may push the ends out by up to one.
            let step = scales.values[flat / group_size as usize].abs();
            assert!((a - b).abs() <= 1.01 * step, "{bits} bits of {group_size}: {a} became {b}");
        }
    }
}

#[test]
fn the_bytes_are_those_of_the_format() {
    for (group_size, bits) in formats() {
        let weight = quantized([4, 128], group_size, bits, Dtype::Float16);
        let expected = 4 * 128 * bits / 8 + 2 * 2 * 4 * 128 / group_size;
        assert_eq!(weight.nbytes(), expected as usize, "{bits} bits of {group_size}");
    }
}

#[test]
fn rows_are_those_of_the_matrix() {
    for (bits, dtype) in [(3, Dtype::Float32), (4, Dtype::Float16), (8, Dtype::Bfloat16)] {
        let weight = quantized([7, 64], 32, bits, dtype);
        let matrix = Tensor::of(&weight.dequantize(dtype).unwrap());
        let ids = [6_usize, 0, 3, 3];
        for index_dtype in [Dtype::Int32, Dtype::Uint32, Dtype::Uint8, Dtype::Int64] {
            let array = Array::from_slice(&ids.map(|id| id as i32), &[2, 2]);
            let rows = weight.rows(array.as_dtype(index_dtype).unwrap()).unwrap();
            let expected =
                Tensor::from_fn(&[2, 2, 64], |at| matrix.at(&[ids[2 * at[0] + at[1]], at[2]]));
            assert_eq!(rows.dtype(), dtype);
            let exact = Tolerance::EXACT;
            assert_close(&format!("rows by {index_dtype:?}"), &rows, &expected, exact);
        }
    }
}

#[test]
fn an_id_that_names_no_row_shows() {
    let weight = quantized([7, 64], 32, 4, Dtype::Float32);
    let rows = weight.rows(Array::from_slice(&[-1, 6, 7, i32::MAX], &[4])).unwrap();
    let is_nan: Vec<_> =
        Tensor::of(&rows).rows().map(|row| row.iter().all(|v| v.is_nan())).collect();
    assert_eq!(is_nan, [true, false, true, true]);
    assert!(Tensor::of(&rows).rows().nth(1).unwrap().iter().all(|v| v.is_finite()));
}

#[test]
fn no_ids_give_no_rows() {
    let weight = quantized([7, 64], 32, 4, Dtype::Float16);
    let rows = weight.rows(Array::zeros::<i32>(&[2, 0]).unwrap()).unwrap();
    assert_eq!((rows.shape(), rows.dtype()), (&[2, 0, 64][..], Dtype::Float16));
}

#[test]
fn quantize_refuses_what_the_format_cannot_hold() {
    let quantize = |shape: &[i32], group_size, bits| {
        message(QuantizedWeight::quantize(normal(1, shape, Dtype::Float32), group_size, bits))
    };
    assert_eq!(
        quantize(&[4, 64], 48, 4),
        "[QuantizedWeight::quantize] group_size must be one of [32, 64, 128] but got 48"
    );
    assert_eq!(
        quantize(&[4, 64], 64, 7),
        "[QuantizedWeight::quantize] bits must be one of [2, 3, 4, 5, 6, 8] but got 7"
    );
    assert_eq!(
        quantize(&[4, 65], 64, 4),
        "[QuantizedWeight::quantize] I must be a multiple of group_size 64 and not 0 but got 65"
    );
    assert!(quantize(&[4, 0], 64, 4).contains("I must"));
    assert!(quantize(&[0, 64], 64, 4).contains("O must be at least 1"));
    assert!(quantize(&[64], 64, 4).contains("matrix must have shape [O, I]"));
    let ints = Array::zeros::<i32>(&[4, 64]).unwrap();
    assert!(message(QuantizedWeight::quantize(ints, 64, 4)).contains("matrix must have dtype"));
}

#[test]
fn parts_must_explain_every_shape() {
    let good = || {
        let weight = quantized([4, 128], 64, 4, Dtype::Float32);
        (weight.weight().clone(), weight.scales().clone(), weight.biases().clone())
    };
    let from =
        |parts, group_size, bits| message(QuantizedWeight::from_parts(parts, group_size, bits));
    assert!(QuantizedWeight::from_parts(good(), 64, 4).is_ok());
    assert_eq!(
        from(good(), 64, 8),
        "[QuantizedWeight] weight must have shape [4, 32] but got [4, 16]"
    );
    assert!(from(good(), 32, 4).contains("weight must have shape [4, 8]"));
    assert!(from(good(), 64, 1).contains("bits must be one of"));
    assert!(from(good(), 16, 4).contains("group_size must be one of"));
    let (w, s, b) = good();
    assert!(
        from((w.as_dtype(Dtype::Int32).unwrap(), s.clone(), b.clone()), 64, 4)
            .contains("weight must have dtype Uint32")
    );
    assert!(from((w.clone(), w.clone(), b.clone()), 64, 4).contains("scales must have dtype"));
    assert!(
        from((w.clone(), s.clone(), b.as_dtype(Dtype::Float16).unwrap()), 64, 4)
            .contains("biases must have dtype Float32")
    );
    assert!(from((w.clone(), s.clone(), b.t()), 64, 4).contains("biases must have shape [4, 2]"));
    assert!(from((w.t(), s.clone(), b.clone()), 64, 4).contains("weight must have shape [4, 16]"));
    let empty = Array::zeros::<f32>(&[0, 2]).unwrap();
    assert!(from((w.clone(), empty.clone(), empty), 64, 4).contains("O must be at least 1"));
    let empty = Array::zeros::<f32>(&[4, 0]).unwrap();
    assert!(from((w, empty.clone(), empty), 64, 4).contains("I / G must be at least 1"));
}

#[test]
fn parts_too_wide_to_count_are_refused() {
    // Their sizes, counted in i32, would come round to those of no words at all.
    let scales = broadcast_to(Array::from_f32(0.0), &[1, 1 << 27]).unwrap();
    let words = Array::zeros::<u32>(&[1, 0]).unwrap();
    assert_eq!(
        message(QuantizedWeight::from_parts((words, scales.clone(), scales), 128, 8)),
        "[QuantizedWeight] I / G must be at most 16777215 but got 134217728"
    );
}

#[test]
fn unpacking_and_looking_up_refuse_other_dtypes() {
    let weight = quantized([4, 64], 64, 4, Dtype::Float32);
    assert!(message(weight.dequantize(Dtype::Int32)).contains("dtype must have dtype Float32"));
    assert!(message(weight.rows(Array::from_f32(1.0))).contains("ids must have dtype Int32"));
}
