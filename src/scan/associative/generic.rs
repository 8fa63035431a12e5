//! Scans by a function of the caller's.

use mlx_rs::{Array, Dtype};

use super::{
    chunked::{Combine, Scanner, all, cut},
    options::ScanOptions,
    segments::{self, Places},
};
use crate::{check::Check, dispatch::Target, error::Result, scan, uploads};

const OP: &str = "generic_scan";

/// Options of [`generic_scan`].
#[derive(Debug, Clone, Copy)]
pub struct GenericScanOptions<'a> {
    /// The axis that is scanned, of each array counted from its end where below zero. Default: −1.
    pub axis: i32,
    /// Whether the last element comes first. Default: no.
    pub reverse: bool,
    /// As [`ScanOptions::segments`]. Default: one.
    pub segments: Option<&'a [i32]>,
}

impl Default for GenericScanOptions<'_> {
    fn default() -> Self {
        Self { axis: ScanOptions::DEFAULT_AXIS, reverse: false, segments: None }
    }
}

/// Combines each element of an axis with all before it, by any associative function of elements.
///
/// An element may have several parts, one in each of `elements`. `combine(first, second)` gets those of many pairs at once:
/// each array has pairs along axis 0, and then the axes that it has in `elements` but for the scanned one, in their order.
/// It returns as many arrays of the same shapes and dtypes, and must be associative, but need not commute. It is called about
/// twice as often as there are steps in a chunk, builds a graph and evaluates nothing, so that gradients go through it.
///
/// # Shapes
/// - `elements`: any number of arrays from one, of any dtype and any rank that has the axis, which is as long in all
/// - results: one for each, of its shape and dtype
///
/// # Errors
/// When there is no array, when one has no such axis or one of another length, or is f64 on a GPU, when `segments` are none of
/// it, when `combine` returns other arrays than it should, or what it fails with.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GenericScanOptions, generic_scan};
/// use mlx_rs::array;
///
/// // Matrices, each times all before it.
/// let turns = array!([[[0.0, -1.0], [1.0, 0.0]], [[0.0, -1.0], [1.0, 0.0]]]);
/// let options = GenericScanOptions { axis: 0, ..Default::default() };
/// let product = |first: &[_], second: &[mlx_rs::Array]| Ok(vec![second[0].matmul(&first[0])?]);
/// let turned = generic_scan(&[turns], product, options)?;
/// assert_eq!(turned[0].as_slice::<f32>()[4..], [-1.0, 0.0, 0.0, -1.0]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain MLX ops, in the dtypes of the arrays: chunks of time are scanned side by side, step by step, and so are their totals;
/// about two combinations an element.
pub fn generic_scan(
    elements: &[Array],
    combine: impl Fn(&[Array], &[Array]) -> Result<Vec<Array>>,
    options: GenericScanOptions<'_>,
) -> Result<Vec<Array>> {
    let check = Check::op(OP);
    let axes = axes(check, elements, options.axis)?;
    if Target::current()? != Target::Cpu {
        let double = elements.iter().any(|array| array.dtype() == Dtype::Float64);
        check.value(!double, "elements", "be of dtypes that a GPU has", "Float64")?;
    }
    scan::segments::along(check, options.segments, elements[0].dim(axes[0]))?;
    if elements[0].dim(axes[0]) == 0 {
        return Ok(elements.to_vec());
    }
    let checked = |first: &[Array], second: &[Array]| {
        let combined = combine(first, second)?;
        same(check, &combined, second)?;
        Ok(combined)
    };
    let first = elements.iter().zip(&axes).map(|(array, &axis)| array.move_axis(axis, 0));
    let mut first = first.collect::<Result<Vec<_>, _>>()?;
    let scanned = match options.segments {
        None => from_the_first(&first, Scanner { combine: &checked, reverse: options.reverse })?,
        Some(segments) => {
            let length = first[0].dim(0);
            let bounds = uploads::integers(segments.to_vec());
            first.push(Places::new(&bounds, length, options.reverse)?.starts);
            let combine: Combine = &|first, second| segments::combine(first, second, &checked);
            from_the_first(&first, Scanner { combine, reverse: options.reverse })?
        }
    };
    let back = scanned.iter().zip(&axes).map(|(array, &axis)| array.move_axis(0, axis));
    Ok(back.collect::<Result<Vec<_>, _>>()?)
}

/// The axis of each array, counted from its start.
fn axes(check: Check, elements: &[Array], axis: i32) -> Result<Vec<i32>> {
    check.value(!elements.is_empty(), "elements", "hold an array or more", "none")?;
    let axes = elements
        .iter()
        .map(|array| Ok(check.axis("axis", axis, "each array", array)?.cast_signed() as i32));
    let axes = axes.collect::<Result<Vec<_>>>()?;
    let length = elements[0].dim(axes[0]);
    for (array, &axis) in elements.iter().zip(&axes) {
        let found = array.dim(axis);
        let expected = format_args!("have the length {length} of the first in every array");
        check.value(found == length, "axis", expected, found)?;
    }
    Ok(axes)
}

fn same(check: Check, combined: &[Array], like: &[Array]) -> Result<()> {
    let expected = format_args!("return {} arrays", like.len());
    check.value(combined.len() == like.len(), "combine", expected, combined.len())?;
    for (array, like) in combined.iter().zip(like) {
        check.same_shape("result of combine", array, like)?;
        check.dtype_among("result of combine", array, &[like.dtype()])?;
    }
    Ok(())
}

fn from_the_first(elements: &[Array], scanner: Scanner) -> Result<Vec<Array>> {
    let length = elements[0].dim(0);
    if length == 1 {
        return Ok(elements.to_vec());
    }
    let (first, others) = cut(scanner.reverse, 0..length, 1);
    let first = all(elements, first)?;
    scanner.concatenated(&first, &scanner.scan(&all(elements, others)?, &first)?)
}
