//! Small arrays of numbers from the host, kept for the next call.
//!
//! A GPU pays for its first look at memory that the host wrote: on an H200 some 20 µs of a call's time for each array.

use std::{cell::RefCell, collections::VecDeque};

use half::{bf16, f16};
use mlx_rs::{Array, Dtype};

/// How many arrays a thread keeps: some for each of the models it runs in turn.
const KEPT: usize = 64;

thread_local! {
    static RECENT: RefCell<VecDeque<(Contents, Array)>> = const { RefCell::new(VecDeque::new()) };
}

/// What is in an array.
#[derive(Debug, Clone, PartialEq)]
enum Contents {
    U64(Vec<u64>),
    I32(Vec<i32>),
    /// Numbers by their bits, so that NaN is what it was.
    F32(Vec<u32>),
    Float(u32),
    Int(i32),
    Unsigned(u32),
    /// Of this shape; f32 where the type is none of f16, bf16 and int32.
    Zeros(Dtype, Vec<i32>),
}

impl Contents {
    fn upload(&self) -> Array {
        match self {
            Self::Zeros(dtype, shape) => {
                let count = shape.iter().product::<i32>().unsigned_abs() as usize;
                match dtype {
                    Dtype::Float16 => Array::from_slice(&vec![f16::ZERO; count], shape),
                    Dtype::Bfloat16 => Array::from_slice(&vec![bf16::ZERO; count], shape),
                    Dtype::Int32 => Array::from_slice(&vec![0; count], shape),
                    _ => Array::from_slice(&vec![0.0_f32; count], shape),
                }
            }
            Self::Float(bits) => Array::from_f32(f32::from_bits(*bits)),
            Self::Int(value) => Array::from_int(*value),
            Self::Unsigned(value) => Array::from_slice(&[*value], &[]),
            Self::U64(values) => Array::from_slice(values, &[values.len() as i32]),
            Self::I32(values) => Array::from_slice(values, &[values.len() as i32]),
            Self::F32(bits) => {
                let values: Vec<_> = bits.iter().copied().map(f32::from_bits).collect();
                Array::from_slice(&values, &[values.len() as i32])
            }
        }
    }
}

/// A vector of these numbers.
pub(crate) fn numbers(values: Vec<u64>) -> Array {
    kept(Contents::U64(values))
}

/// A vector of these integers.
pub(crate) fn integers(values: Vec<i32>) -> Array {
    kept(Contents::I32(values))
}

/// A vector of these f32.
pub(crate) fn floats(values: impl Iterator<Item = f32>) -> Array {
    kept(Contents::F32(values.map(f32::to_bits).collect()))
}

/// A 0-d f32.
pub(crate) fn float(value: f32) -> Array {
    kept(Contents::Float(value.to_bits()))
}

/// A 0-d int32.
pub(crate) fn int(value: i32) -> Array {
    kept(Contents::Int(value))
}

/// A 0-d uint32.
pub(crate) fn unsigned(value: u32) -> Array {
    kept(Contents::Unsigned(value))
}

/// Zeros of this shape; f32 where `dtype` is none of f16, bf16 and int32.
pub(crate) fn zeros(dtype: Dtype, shape: &[i32]) -> Array {
    kept(Contents::Zeros(dtype, shape.to_vec()))
}

/// The array of before, where it is among the last that were asked for.
fn kept(contents: Contents) -> Array {
    RECENT.with_borrow_mut(|recent| {
        let before = recent.iter().position(|(known, _)| *known == contents);
        let array = match before.and_then(|place| recent.remove(place)) {
            Some((_, array)) => array,
            None => contents.upload(),
        };
        recent.truncate(KEPT - 1);
        recent.push_front((contents, array.clone()));
        array
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gets_its_own_numbers() {
        for round in 0..2 {
            for value in 0..2 * KEPT as i32 {
                assert_eq!(
                    integers(vec![value; 3]).as_slice::<i32>(),
                    &[value; 3],
                    "round {round}"
                );
                let value = value as u64;
                assert_eq!(numbers(vec![value, 7]).as_slice::<u64>(), &[value, 7]);
            }
        }
    }

    #[test]
    fn what_is_asked_for_often_stays() {
        let often = || integers(vec![-1, -2]).as_slice::<i32>().as_ptr();
        let first = often();
        for value in 0..3 * KEPT as i32 {
            integers(vec![value, 5]);
            assert_eq!(often(), first, "{value}");
        }
    }

    #[test]
    fn no_more_is_kept_than_said() {
        for value in 0..2 * KEPT as i32 {
            integers(vec![value, 2]);
        }
        RECENT.with_borrow(|recent| assert_eq!(recent.len(), KEPT));
    }

    #[test]
    fn floats_are_kept_by_their_bits() {
        let place = |values: [f32; 2]| floats(values.into_iter()).as_slice::<f32>().as_ptr();
        let unlike = floats([0.0, f32::NAN].into_iter());
        assert_eq!(unlike.as_slice::<f32>()[0].to_bits(), 0);
        assert!(unlike.as_slice::<f32>()[1].is_nan());
        assert_eq!(place([0.0, f32::NAN]), unlike.as_slice::<f32>().as_ptr());
        assert_ne!(place([-0.0, f32::NAN]), unlike.as_slice::<f32>().as_ptr());
    }

    #[test]
    fn numbers_alone_are_kept_too() {
        for value in [0.0, -0.0, 1.5, f32::INFINITY, f32::NAN] {
            assert_eq!(float(value).as_slice::<f32>()[0].to_bits(), value.to_bits());
            let places = [(); 2].map(|()| float(value).as_slice::<f32>().as_ptr());
            assert_eq!(places[0], places[1]);
        }
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Int32] {
            let found = [[1, 2], [2, 1]].map(|shape| zeros(dtype, &shape));
            assert_eq!(found.each_ref().map(Array::dtype), [dtype; 2]);
            assert_eq!([found[0].shape(), found[1].shape()], [[1, 2], [2, 1]]);
        }
        assert_eq!(zeros(Dtype::Float32, &[2]).as_slice::<f32>(), [0.0, 0.0]);
        assert_eq!([int(-3), int(4)].map(|array| array.as_slice::<i32>()[0]), [-3, 4]);
        assert_eq!(int(4).ndim(), 0);
        let large = unsigned(u32::MAX);
        assert_eq!((large.ndim(), large.as_slice::<u32>()), (0, &[u32::MAX][..]));
    }

    #[test]
    fn what_was_asked_for_before_is_the_same_array() {
        let [first, again] = [(); 2].map(|()| numbers(vec![1, 2, 3]));
        assert_eq!(first.as_slice::<u64>().as_ptr(), again.as_slice::<u64>().as_ptr());
    }
}
