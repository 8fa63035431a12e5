//! A matrix of packed integers with a scale and a bias for each group.

use mlx_rs::{
    Array, Dtype,
    ops::{self, select},
};

use crate::{
    check::{Check, axes},
    error::Result,
    ids::within,
    uploads,
};

/// A matrix `[O, I]` in MLX's affine packed format: `W = scale · q + bias`, with `q` an unsigned
/// integer of `bits` bits and one scale and one bias for each `group_size` neighbours of a row.
///
/// # Shapes
/// - weight: `[O, I · bits / 32]`, u32: a row is one little-endian string of bits
/// - scales, biases: `[O, I / G]`, both f32, both f16 or both bf16
///
/// # Memory
/// An element costs `bits / 8` bytes and its share of a scale and a bias: 4-bit groups of 64 with
/// f16 scales come to 0.5625 bytes, where f32 takes 4.
///
/// # Example
/// ```
/// use mlx_primitives::quant::QuantizedWeight;
/// use mlx_rs::{Array, Dtype};
///
/// let weight = QuantizedWeight::quantize(&Array::ones::<f32>(&[8, 128])?, 64, 4)?;
/// assert_eq!(weight.shape(), [8, 128]);
/// assert_eq!(weight.dequantize(Dtype::Float32)?.shape(), [8, 128]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantizedWeight {
    pub(super) weight: Array,
    pub(super) scales: Array,
    pub(super) biases: Array,
    pub(super) group_size: i32,
    pub(super) bits: i32,
}

impl QuantizedWeight {
    /// The group sizes there are.
    pub const GROUP_SIZES: [i32; 3] = [32, 64, 128];

    /// The sizes of a packed element there are.
    pub const BITS: [i32; 6] = [2, 3, 4, 5, 6, 8];

    /// Rounds `matrix`, `[O, I]`, to `2^bits` levels for each group of `group_size`. The scales and
    /// biases take its dtype.
    ///
    /// # Errors
    /// When `matrix` is not floating point, not of rank 2, or empty, when `I` is no multiple of
    /// `group_size`, or when `group_size` or `bits` is none of those there are.
    pub fn quantize(matrix: impl AsRef<Array>, group_size: i32, bits: i32) -> Result<Self> {
        let check = Check::op("QuantizedWeight::quantize");
        let matrix = matrix.as_ref();
        check.floating("matrix", matrix)?;
        check.shape("matrix", matrix, axes!["O", "I"])?;
        check_format(check, group_size, bits)?;
        check.at_least("O", matrix.dim(0), 1)?;
        let fits = matrix.dim(1) > 0 && matrix.dim(1) % group_size == 0;
        let expected = format_args!("be a multiple of group_size {group_size} and not 0");
        check.value(fits, "I", expected, matrix.dim(1))?;
        let parts = ops::quantize(matrix, group_size, bits)?;
        Self::from_parts(parts, group_size, bits)
    }

    /// Takes `(weight, scales, biases)` as they stand in a file, or as [`mlx_rs::ops::quantize`]
    /// returns them. Nothing is inferred: `group_size` and `bits` must explain every shape.
    ///
    /// # Errors
    /// When a shape or a dtype is not that of the format, when the matrix is empty or wider than an
    /// array may be, or when `group_size` or `bits` is none of those there are.
    pub fn from_parts(
        (weight, scales, biases): (Array, Array, Array),
        group_size: i32,
        bits: i32,
    ) -> Result<Self> {
        let check = Check::op("QuantizedWeight");
        check_format(check, group_size, bits)?;
        check.dtype_among("weight", &weight, &[Dtype::Uint32])?;
        let dtype = check.floating("scales", &scales)?;
        check.dtype_among("biases", &biases, &[dtype])?;
        check.shape("scales", &scales, axes!["O", "I / G"])?;
        let (outputs, groups) = (scales.dim(0), scales.dim(1));
        check.at_least("O", outputs, 1)?;
        check.at_least("I / G", groups, 1)?;
        check.shape("biases", &biases, axes![outputs, groups])?;
        let expected = format_args!("be at most {}", i32::MAX / group_size);
        let inputs = check.known(groups.checked_mul(group_size), "I / G", expected, groups)?;
        check.shape("weight", &weight, axes![outputs, inputs / 32 * bits])?;
        Ok(Self { weight, scales, biases, group_size, bits })
    }

    /// The packed integers, `[O, I · bits / 32]`, u32.
    pub fn weight(&self) -> &Array {
        &self.weight
    }

    /// What a packed integer is multiplied by, `[O, I / G]`.
    pub fn scales(&self) -> &Array {
        &self.scales
    }

    /// What is added after that, `[O, I / G]`.
    pub fn biases(&self) -> &Array {
        &self.biases
    }

    /// How many neighbours of a row share a scale and a bias.
    pub fn group_size(&self) -> i32 {
        self.group_size
    }

    /// The size of a packed element.
    pub fn bits(&self) -> i32 {
        self.bits
    }

    /// `[O, I]`, the shape of the matrix this stands for.
    pub fn shape(&self) -> [i32; 2] {
        [self.scales.dim(0), self.scales.dim(1) * self.group_size]
    }

    /// The bytes that the three arrays take.
    pub fn nbytes(&self) -> usize {
        self.weight.nbytes() + self.scales.nbytes() + self.biases.nbytes()
    }

    /// Unpacks the whole matrix, `[O, I]`, in f32, and rounds it once to `dtype`.
    ///
    /// # Errors
    /// When `dtype` is not f32, f16 or bf16.
    pub fn dequantize(&self, dtype: Dtype) -> Result<Array> {
        Check::op("QuantizedWeight::dequantize").floating_dtype("dtype", dtype)?;
        // MLX unpacks in the dtype of the scales, on a CPU several times slower for halves.
        let scales = self.scales.as_dtype(Dtype::Float32)?;
        let biases = self.biases.as_dtype(Dtype::Float32)?;
        let matrix = ops::dequantize(&self.weight, scales, &biases, self.group_size, self.bits)?;
        Ok(matrix.as_dtype(dtype)?)
    }

    /// Unpacks the rows `ids`, `[...]` of any integers, to `[..., I]` in the dtype of the scales,
    /// and no other row. An id that names no row gives a row of NaN.
    ///
    /// # Errors
    /// When `ids` holds no integers.
    pub fn rows(&self, ids: impl AsRef<Array>) -> Result<Array> {
        let ids = ids.as_ref();
        Check::op("QuantizedWeight::rows").integer("ids", ids)?;
        let [outputs, inputs] = self.shape();
        let shape = [ids.shape(), &[inputs]].concat();
        if ids.size() == 0 {
            return Ok(ops::zeros_dtype(&shape, self.scales.dtype())?);
        }
        let (known, safe) = within(&ids.reshape(&[-1])?, outputs)?;
        let gathered = Self {
            weight: self.weight.take_axis(&safe, 0)?,
            scales: self.scales.take_axis(&safe, 0)?,
            biases: self.biases.take_axis(&safe, 0)?,
            ..*self
        };
        let rows = gathered.dequantize(self.scales.dtype())?;
        let unknown = uploads::float(f32::NAN).as_dtype(rows.dtype())?;
        Ok(select(known.reshape(&[-1, 1])?, rows, unknown)?.reshape(&shape)?)
    }
}

fn check_format(check: Check, group_size: i32, bits: i32) -> Result<()> {
    let (sizes, widths) = (QuantizedWeight::GROUP_SIZES, QuantizedWeight::BITS);
    let expected = format_args!("be one of {sizes:?}");
    check.value(sizes.contains(&group_size), "group_size", expected, group_size)?;
    check.value(widths.contains(&bits), "bits", format_args!("be one of {widths:?}"), bits)
}
