//! Quantization in every mode of MLX; mlx-rs offers affine alone.

use std::ffi::CStr;

use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result},
    ops::zeros_dtype,
};
use mlx_sys::{mlx_optional_dtype, mlx_optional_int};

use super::{
    array::{self, NONE},
    stream,
    vector::Vector,
};

/// How a group of weights is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum QuantMode {
    /// Unsigned integers with a scale and a bias, both of the weights' own type.
    #[default]
    Affine,
    /// 4-bit floats (e2m1) with a power of two (e8m0) for each 32.
    Mxfp4,
    /// 8-bit floats (e4m3) with a power of two (e8m0) for each 32.
    Mxfp8,
    /// 4-bit floats (e2m1) with an 8-bit float (e4m3) for each 16.
    Nvfp4,
}

impl QuantMode {
    fn name(self) -> &'static CStr {
        match self {
            Self::Affine => c"affine",
            Self::Mxfp4 => c"mxfp4",
            Self::Mxfp8 => c"mxfp8",
            Self::Nvfp4 => c"nvfp4",
        }
    }

    /// The sizes of group that the mode has, the default first.
    fn group_sizes(self) -> &'static [i32] {
        match self {
            Self::Affine => &[64, 32, 128],
            Self::Mxfp4 | Self::Mxfp8 => &[32],
            Self::Nvfp4 => &[16],
        }
    }

    /// The numbers of bits that the mode has, the default first.
    fn bits(self) -> &'static [i32] {
        match self {
            Self::Affine => &[4, 2, 3, 5, 6, 8],
            Self::Mxfp4 | Self::Nvfp4 => &[4],
            Self::Mxfp8 => &[8],
        }
    }
}

/// A mode, and how many weights share a scale and how many bits each takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuantFormat {
    mode: QuantMode,
    group_size: i32,
    bits: i32,
}

impl Default for QuantFormat {
    fn default() -> Self {
        QuantMode::default().into()
    }
}

impl From<QuantMode> for QuantFormat {
    fn from(mode: QuantMode) -> Self {
        Self { mode, group_size: mode.group_sizes()[0], bits: mode.bits()[0] }
    }
}

impl QuantFormat {
    /// A format of `mode`, with the mode's own group size and bits where none are given.
    ///
    /// # Errors
    ///
    /// A group size or a number of bits that the mode does not have.
    pub(crate) fn new(
        mode: QuantMode,
        group_size: impl Into<Option<i32>>,
        bits: impl Into<Option<i32>>,
    ) -> Result<Self> {
        let choose = |what: &str, value: Option<i32>, options: &[i32]| {
            let value = value.unwrap_or(options[0]);
            if options.contains(&value) {
                return Ok(value);
            }
            let name = mode.name().to_string_lossy();
            Err(Exception::custom(format!(
                "[quantize] {what} must be one of {options:?} for {name} but got {value}"
            )))
        };
        Ok(Self {
            mode,
            group_size: choose("group_size", group_size.into(), mode.group_sizes())?,
            bits: choose("bits", bits.into(), mode.bits())?,
        })
    }

    pub(crate) fn mode(self) -> QuantMode {
        self.mode
    }

    pub(crate) fn group_size(self) -> i32 {
        self.group_size
    }

    pub(crate) fn bits(self) -> i32 {
        self.bits
    }
}

/// A quantized matrix: `[.., N, K]` weights as `[.., N, K * bits / 32]` words and `[.., N, K / group_size]` scales.
#[derive(Clone, Copy)]
pub(crate) struct Packed<A = Array> {
    pub(crate) weight: A,
    pub(crate) scales: A,
    /// Of [`QuantMode::Affine`] alone; of the shape of `scales`.
    pub(crate) biases: Option<A>,
}

impl Packed {
    pub(crate) fn as_ref(&self) -> Packed<&Array> {
        Packed { weight: &self.weight, scales: &self.scales, biases: self.biases.as_ref() }
    }
}

/// Quantizes the rows of a matrix, or of a stack of matrices.
///
/// # Errors
///
/// Weights that are not `f32`, `f16` or `bf16`, are empty, have fewer than two axes, or whose rows are not whole groups.
pub(crate) fn quantize(weight: &Array, format: QuantFormat) -> Result<Packed> {
    require(is_float(weight), || {
        format!("[quantize] weight must be f32, f16 or bf16 but got {:?}", weight.dtype())
    })?;
    require(weight.size() > 0, || {
        format!("[quantize] weight must not be empty but got {:?}", weight.shape())
    })?;
    let stream = stream::current();
    // SAFETY: the array, the stream and the name are alive for the whole call.
    let parts = Vector::out(|res| unsafe {
        mlx_sys::mlx_quantize(
            res,
            weight.as_ptr(),
            some_int(format.group_size),
            some_int(format.bits),
            format.mode.name().as_ptr(),
            NONE,
            stream.as_ptr(),
        )
    })?;
    let mut parts = parts.to_arrays()?.into_iter();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(weight), Some(scales), biases) => Ok(Packed { weight, scales, biases }),
        _ => Err(Exception::custom("MLX wrote no scales")),
    }
}

/// Restores a quantized matrix, as `dtype`, or as the type of affine scales and `bf16` in the other modes.
///
/// # Errors
///
/// Parts that do not fit each other or the format; a `dtype` other than `f32`, `f16` and `bf16`.
pub(crate) fn dequantize(
    packed: Packed<&Array>,
    format: QuantFormat,
    dtype: impl Into<Option<Dtype>>,
) -> Result<Array> {
    let dtype = dtype.into();
    check_packed("dequantize", packed, format)?;
    require(dtype.is_none_or(is_float_type), || {
        format!("[dequantize] dtype must be f32, f16 or bf16 but got {dtype:?}")
    })?;
    let stream = stream::current();
    // SAFETY: the arrays, the stream and the name are alive for the whole call.
    array::out(|res| unsafe {
        mlx_sys::mlx_dequantize(
            res,
            packed.weight.as_ptr(),
            packed.scales.as_ptr(),
            array::optional(packed.biases),
            some_int(format.group_size),
            some_int(format.bits),
            format.mode.name().as_ptr(),
            NONE,
            mlx_optional_dtype {
                value: dtype.unwrap_or(Dtype::Float32).into(),
                has_value: dtype.is_some(),
            },
            stream.as_ptr(),
        )
    })
}

/// `x @ w^T` for a quantized `w` of shape `[.., N, K]`, or `x @ w` for one of shape `[.., K, N]`.
///
/// The result has the type of `x`, or in affine mode the one that `x`, scales and biases promote to. An `x` with no
/// element gives a result with none.
///
/// # Errors
///
/// Parts that do not fit each other, the format or `x`; an `x` that is not `f32`, `f16` or `bf16`.
pub(crate) fn quantized_matmul(
    x: &Array,
    packed: Packed<&Array>,
    transpose: bool,
    format: QuantFormat,
) -> Result<Array> {
    check_packed("quantized_matmul", packed, format)?;
    require(is_float(x) && x.ndim() > 0, || {
        format!(
            "[quantized_matmul] x must be f32, f16 or bf16 of at least one axis but got {:?} of shape {:?}",
            x.dtype(),
            x.shape()
        )
    })?;
    let stacked = packed.weight.ndim() > 2;
    require(!stacked || x.ndim() > 2 && x.size() > 0, || {
        format!(
            "[quantized_matmul] x must have elements and at least three axes for weights of shape {:?} but got {:?}",
            packed.weight.shape(),
            x.shape()
        )
    })?;
    let stream = stream::current();
    // SAFETY: the arrays, the stream and the name are alive for the whole call.
    let product = array::out(|res| unsafe {
        mlx_sys::mlx_quantized_matmul(
            res,
            x.as_ptr(),
            packed.weight.as_ptr(),
            packed.scales.as_ptr(),
            array::optional(packed.biases),
            transpose,
            some_int(format.group_size),
            some_int(format.bits),
            format.mode.name().as_ptr(),
            stream.as_ptr(),
        )
    })?;
    if x.size() == 0 {
        // MLX divides by the number of rows when it evaluates.
        return zeros_dtype(product.shape(), product.dtype());
    }
    Ok(product)
}

/// Checks what MLX takes for granted: it reads out of bounds, divides by zero or ends the process otherwise.
fn check_packed(op: &str, packed: Packed<&Array>, format: QuantFormat) -> Result<()> {
    let Packed { weight, scales, biases } = packed;
    require(weight.dtype() == Dtype::Uint32, || {
        format!("[{op}] weight must be packed as u32 but got {:?}", weight.dtype())
    })?;
    require(weight.size() > 0 && weight.ndim() >= 2, || {
        format!(
            "[{op}] weight must have elements and at least two axes but got {:?}",
            weight.shape()
        )
    })?;
    let mut expected = weight.shape().to_vec();
    if let Some(last) = expected.last_mut() {
        let elements = i64::from(*last) * 32 / i64::from(format.bits);
        let whole = elements % i64::from(format.group_size) == 0;
        *last = i32::try_from(elements / i64::from(format.group_size)).unwrap_or(i32::MAX);
        require(whole, || {
            format!(
                "[{op}] weight must hold whole groups but got {:?} for {format:?}",
                weight.shape()
            )
        })?;
    }
    require(scales.shape() == expected, || {
        format!("[{op}] scales must have shape {expected:?} but got {:?}", scales.shape())
    })?;
    if format.mode != QuantMode::Affine {
        require(biases.is_none(), || format!("[{op}] biases must be absent for {format:?}"))?;
        return require(scales.dtype() == Dtype::Uint8, || {
            format!("[{op}] scales must be u8 for {format:?} but got {:?}", scales.dtype())
        });
    }
    let Some(biases) = biases else {
        return Err(Exception::custom(format!("[{op}] biases must be given for {format:?}")));
    };
    require(biases.shape() == expected, || {
        format!("[{op}] biases must have shape {expected:?} but got {:?}", biases.shape())
    })?;
    require(is_float(scales) && is_float(biases), || {
        format!(
            "[{op}] scales and biases must be f32, f16 or bf16 but got {:?} and {:?}",
            scales.dtype(),
            biases.dtype()
        )
    })
}

fn require(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Exception::custom(text())) }
}

fn is_float(array: &Array) -> bool {
    is_float_type(array.dtype())
}

fn is_float_type(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16)
}

fn some_int(value: i32) -> mlx_optional_int {
    mlx_optional_int { value, has_value: true }
}

#[cfg(test)]
mod tests;
