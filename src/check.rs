//! Every check of an argument, and the only wording of a refusal.
//!
//! An operation opens with `let check = Check::op("name")`, states what it needs, and from then on
//! its implementations trust what they read.

use std::fmt::Display;

use mlx_rs::{Array, Dtype};

use crate::error::{Error, Result};

/// The element types a floating-point operation takes.
const FLOATING: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];

/// One axis of a shape an argument must have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Axis {
    /// Any size, the empty axis included; the letter is for the message.
    Any(&'static str),
    /// This size and no other.
    Is(i32),
}

impl From<&'static str> for Axis {
    fn from(letter: &'static str) -> Self {
        Self::Any(letter)
    }
}

impl From<i32> for Axis {
    fn from(size: i32) -> Self {
        Self::Is(size)
    }
}

impl Axis {
    fn matches(self, size: i32) -> bool {
        match self {
            Self::Any(_) => true,
            Self::Is(expected) => size == expected,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Any(letter) => (*letter).to_owned(),
            Self::Is(size) => size.to_string(),
        }
    }
}

/// Spells a shape as the docs do: `axes!["B", "S", 64]`.
macro_rules! axes {
    ($($axis:expr),* $(,)?) => { &[$($crate::check::Axis::from($axis)),*][..] };
}
pub(crate) use axes;

/// Checks arguments on behalf of one operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Check {
    op: &'static str,
}

impl Check {
    pub(crate) const fn op(op: &'static str) -> Self {
        Self { op }
    }

    /// `array` has exactly these axes.
    pub(crate) fn shape(&self, name: &'static str, array: &Array, axes: &[Axis]) -> Result<()> {
        let shape = array.shape();
        let fits = shape.len() == axes.len()
            && axes.iter().zip(shape).all(|(axis, &size)| axis.matches(size));
        if fits {
            return Ok(());
        }
        let letters: Vec<_> = axes.iter().map(Axis::describe).collect();
        Err(self.bad_shape(name, array, format!("[{}]", letters.join(", "))))
    }

    /// `array` has any rank of one or more, and its last axis holds something; returns its size.
    pub(crate) fn last_axis(&self, name: &'static str, array: &Array) -> Result<i32> {
        match array.shape().last() {
            Some(&size) if size > 0 => Ok(size),
            _ => Err(self.bad_shape(name, array, "[..., D] with D at least 1".to_owned())),
        }
    }

    /// The last axis of `array`, of any rank from one, has `size` elements.
    pub(crate) fn last_axis_is(&self, name: &'static str, array: &Array, size: i32) -> Result<()> {
        match array.shape().last() {
            Some(&found) if found == size => Ok(()),
            _ => Err(self.bad_shape(name, array, format!("[..., {size}]"))),
        }
    }

    /// `axis` is one of `array`, which the message calls `owner`; returns it counted from the start.
    pub(crate) fn axis(
        &self,
        name: &'static str,
        axis: i32,
        owner: &str,
        array: &Array,
    ) -> Result<usize> {
        let rank = array.ndim();
        let from_end = rank.checked_sub(axis.unsigned_abs() as usize);
        let found = if axis < 0 { from_end } else { Some(axis.unsigned_abs() as usize) };
        let expected = format_args!("be an axis of {owner}, which has {rank}");
        self.known(found.filter(|&found| found < rank), name, expected, axis)
    }

    /// `array` has the shape of `other`.
    pub(crate) fn same_shape(
        &self,
        name: &'static str,
        array: &Array,
        other: &Array,
    ) -> Result<()> {
        let axes: Vec<_> = other.shape().iter().map(|&size| Axis::Is(size)).collect();
        self.shape(name, array, &axes)
    }

    /// `array` broadcasts to `target` without changing it.
    pub(crate) fn broadcasts_to(
        &self,
        name: &'static str,
        array: &Array,
        target: &[i32],
    ) -> Result<()> {
        let shape = array.shape();
        let fits = shape.len() <= target.len()
            && shape
                .iter()
                .rev()
                .zip(target.iter().rev())
                .all(|(&from, &to)| from == to || from == 1);
        if fits {
            return Ok(());
        }
        Err(self.bad_shape(name, array, format!("broadcastable to {target:?}")))
    }

    /// `mask` is boolean or additive, and broadcasts to `scores`, `[B, H, S_q, S_kv]`.
    pub(crate) fn mask(&self, mask: &Array, scores: &[i32; 4]) -> Result<()> {
        use Dtype::{Bfloat16, Bool, Float16, Float32};
        self.dtype_among("mask", mask, &[Bool, Float32, Float16, Bfloat16])?;
        self.broadcasts_to("mask", mask, scores)
    }

    /// A module's heads: one or more of each, of one element or more, and as many query heads for
    /// each key head.
    pub(crate) fn heads(&self, num_heads: i32, num_kv_heads: i32, head_dim: i32) -> Result<()> {
        self.at_least("num_heads", num_heads, 1)?;
        self.at_least("head_dim", head_dim, 1)?;
        self.at_least("num_kv_heads", num_kv_heads, 1)?;
        let divides = num_heads % num_kv_heads == 0;
        let expected = format_args!("be a multiple of num_kv_heads = {num_kv_heads}");
        self.value(divides, "num_heads", expected, num_heads)
    }

    /// `array` holds f32, f16 or bf16; returns which.
    pub(crate) fn floating(&self, name: &'static str, array: &Array) -> Result<Dtype> {
        self.dtype_among(name, array, &FLOATING)
    }

    /// `dtype` is f32, f16 or bf16.
    pub(crate) fn floating_dtype(&self, name: &'static str, dtype: Dtype) -> Result<()> {
        self.one_of(name, dtype, &FLOATING)
    }

    /// `array` holds integers, signed or not.
    pub(crate) fn integer(&self, name: &'static str, array: &Array) -> Result<Dtype> {
        use Dtype::{Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
        self.dtype_among(name, array, &[Int32, Uint32, Int64, Uint64, Int16, Uint16, Int8, Uint8])
    }

    /// `array` has one of these element types; returns which.
    pub(crate) fn dtype_among(
        &self,
        name: &'static str,
        array: &Array,
        allowed: &[Dtype],
    ) -> Result<Dtype> {
        let found = array.dtype();
        self.one_of(name, found, allowed)?;
        Ok(found)
    }

    fn one_of(&self, name: &'static str, found: Dtype, allowed: &[Dtype]) -> Result<()> {
        if allowed.contains(&found) {
            return Ok(());
        }
        let names: Vec<_> = allowed.iter().map(|dtype| format!("{dtype:?}")).collect();
        let expected = names.join(" or ");
        Err(Error::Dtype { op: self.op, argument: name, expected, found })
    }

    /// `value` is finite and above zero.
    pub(crate) fn positive(&self, name: &'static str, value: f32) -> Result<()> {
        self.value(value.is_finite() && value > 0.0, name, "be finite and above 0", value)
    }

    /// `value` is finite and not below zero.
    pub(crate) fn non_negative(&self, name: &'static str, value: f32) -> Result<()> {
        self.value(value.is_finite() && value >= 0.0, name, "be finite and at least 0", value)
    }

    /// `value` is neither infinite nor NaN.
    pub(crate) fn finite(&self, name: &'static str, value: f32) -> Result<()> {
        self.value(value.is_finite(), name, "be finite", value)
    }

    /// `value` is `least` or more.
    pub(crate) fn at_least(&self, name: &'static str, value: i32, least: i32) -> Result<()> {
        self.value(value >= least, name, format_args!("be at least {least}"), value)
    }

    /// Any other condition; `expected` completes "argument must …".
    pub(crate) fn value(
        &self,
        holds: bool,
        name: &'static str,
        expected: impl Display,
        found: impl Display,
    ) -> Result<()> {
        self.known(holds.then_some(()), name, expected, found)
    }

    /// What `found` stands for, where it stands for something; `expected` completes "argument must …".
    pub(crate) fn known<T>(
        &self,
        meaning: Option<T>,
        name: &'static str,
        expected: impl Display,
        found: impl Display,
    ) -> Result<T> {
        meaning.ok_or_else(|| Error::Value {
            op: self.op,
            argument: name,
            expected: expected.to_string(),
            found: found.to_string(),
        })
    }

    fn bad_shape(&self, argument: &'static str, array: &Array, expected: String) -> Error {
        Error::Shape { op: self.op, argument, expected, found: array.shape().to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: Check = Check::op("op");

    fn array(shape: &[i32]) -> Array {
        let count = shape.iter().product::<i32>() as usize;
        Array::from_slice(&vec![0.0_f32; count], shape)
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_shape_matches_letters_and_sizes() {
        assert!(CHECK.shape("x", &array(&[2, 3]), axes!["B", 3]).is_ok());
        assert_eq!(
            message(CHECK.shape("x", &array(&[2, 3]), axes!["B", 4])),
            "[op] x must have shape [B, 4] but got [2, 3]"
        );
        assert!(CHECK.shape("x", &array(&[2, 3]), axes!["B"]).is_err());
    }

    #[test]
    fn the_last_axis_must_exist_and_hold_something() {
        assert_eq!(CHECK.last_axis("x", &array(&[0, 4])).ok(), Some(4));
        assert!(CHECK.last_axis("x", &array(&[])).is_err());
        assert_eq!(
            message(CHECK.last_axis("x", &array(&[4, 0]))),
            "[op] x must have shape [..., D] with D at least 1 but got [4, 0]"
        );
    }

    #[test]
    fn the_last_axis_may_have_to_be_of_one_size() {
        assert!(CHECK.last_axis_is("x", &array(&[2, 3]), 3).is_ok());
        assert_eq!(
            message(CHECK.last_axis_is("x", &array(&[2, 3]), 4)),
            "[op] x must have shape [..., 4] but got [2, 3]"
        );
        assert!(CHECK.last_axis_is("x", &array(&[]), 1).is_err());
    }

    #[test]
    fn an_axis_may_be_counted_from_either_end() {
        let x = array(&[2, 3]);
        let axis = |axis| CHECK.axis("axis", axis, "x", &x).ok();
        assert_eq!([-2, -1, 0, 1].map(axis), [Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!([-3, 2, i32::MIN, i32::MAX].map(axis), [None; 4]);
        assert!(CHECK.axis("axis", 0, "x", &array(&[])).is_err());
        assert_eq!(
            message(CHECK.axis("axis", 2, "x", &x)),
            "[op] axis must be an axis of x, which has 2 but got 2"
        );
    }

    #[test]
    fn broadcasting_never_grows_the_target() {
        let target = [2, 4, 3, 5];
        assert!(CHECK.broadcasts_to("mask", &array(&[3, 5]), &target).is_ok());
        assert!(CHECK.broadcasts_to("mask", &array(&[2, 1, 1, 5]), &target).is_ok());
        assert!(CHECK.broadcasts_to("mask", &array(&[]), &target).is_ok());
        assert!(CHECK.broadcasts_to("mask", &array(&[1, 2, 4, 3, 5]), &target).is_err());
        assert!(CHECK.broadcasts_to("mask", &array(&[4, 5]), &target).is_err());
    }

    #[test]
    fn numbers_that_are_no_numbers_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, -1.0, 0.0] {
            assert!(CHECK.positive("eps", bad).is_err(), "{bad}");
        }
        assert!(CHECK.non_negative("t", 0.0).is_ok());
        assert!(CHECK.non_negative("t", f32::NAN).is_err());
        assert!(CHECK.finite("t", f32::NEG_INFINITY).is_err());
        assert_eq!(message(CHECK.at_least("dims", 0, 1)), "[op] dims must be at least 1 but got 0");
    }

    #[test]
    fn a_dtype_is_named_with_its_alternatives() {
        let ints = Array::from_slice(&[1_i32], &[1]);
        assert_eq!(
            message(CHECK.floating("x", &ints)),
            "[op] x must have dtype Float32 or Float16 or Bfloat16 but got Int32"
        );
        assert!(CHECK.integer("x", &ints).is_ok());
    }
}
