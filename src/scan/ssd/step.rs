//! One step, for decoding.

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, exp},
};

use super::{SsdOptions, delta, finished, options::check_heads};
use crate::{
    check::{Check, axes},
    error::Result,
};

/// What [`ssd_step`] takes a step with: an [`SsdInput`](super::SsdInput) without its axis of time.
#[derive(Debug, Clone, Copy)]
pub struct SsdStep<'a> {
    /// `[B, H, P]`
    pub x: &'a Array,
    /// `[B, H]`
    pub dt: &'a Array,
    /// `[H]`
    pub a: &'a Array,
    /// `[B, G, N]`
    pub b: &'a Array,
    /// `[B, G, N]`
    pub c: &'a Array,
}

/// Takes one step of [`ssd_scan`](super::ssd_scan): the result and the next state, in time that does not depend on how many
/// steps came before.
///
/// # Shapes
/// - `state`: `[B, H, P, N]`, f32, f16 or bf16: that of [`ssd_scan_with_state`](super::ssd_scan_with_state) or of this
/// - `input`: as [`SsdStep`] says, of the dtypes of [`ssd_scan`](super::ssd_scan)
/// - `options`: of [`SsdOptions`] those about `d`, `z`, `[B, H, P]` here, and `dt`; the others are not read
/// - results: `[B, H, P]` in the dtype of `x`, and `[B, H, P, N]` in f32
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `G` does not divide `H`, or when a dtype is
/// not floating point.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{SsdOptions, SsdStep, ssd_step};
/// use mlx_rs::{Array, array};
///
/// let ones = |shape: &[i32]| Array::ones::<f32>(shape);
/// let (x, dt, a, b) = (ones(&[1, 1, 1])?, ones(&[1, 1])?, array!([0.5_f32.ln()]), ones(&[1, 1, 1])?);
/// let input = SsdStep { x: &x, dt: &dt, a: &a, b: &b, c: &b };
/// let (y, state) = ssd_step(ones(&[1, 1, 1, 1])?, input, SsdOptions::default())?;
/// assert!(y.all_close(array!(1.5), None, None, None)? && state.all_close(array!(1.5), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn ssd_step(
    state: impl AsRef<Array>,
    input: SsdStep<'_>,
    options: SsdOptions<'_>,
) -> Result<(Array, Array)> {
    let (state, SsdStep { x, dt, a, b, c }) = (state.as_ref(), input);
    check(state, input, &options)?;
    let repeats = x.dim(1) / b.dim(1);
    let dt = delta(dt, &options)?;
    let wide = x.as_dtype(Dtype::Float32)?;
    let of_heads = |array: &Array| -> Result<Array> {
        let array = array.as_dtype(Dtype::Float32)?.expand_dims(2)?;
        let shape = [array.dim(0), array.dim(1), repeats, array.dim(3)];
        let array = broadcast_to(array, &shape)?;
        Ok(array.reshape(&[shape[0], shape[1] * repeats, shape[3]])?)
    };
    let left = exp(dt.multiply(a.as_dtype(Dtype::Float32)?)?)?.expand_dims_axes(&[-1, -2])?;
    let added = wide.multiply(dt.expand_dims(-1)?)?.expand_dims(-1)?;
    let added = added.multiply(of_heads(b)?.expand_dims(-2)?)?;
    let state = state.as_dtype(Dtype::Float32)?.multiply(left)?.add(added)?;
    let read = state.matmul(of_heads(c)?.expand_dims(-1)?)?.squeeze_axes(&[-1])?;
    Ok((finished(&read, &wide, &options)?.as_dtype(x.dtype())?, state))
}

fn check(state: &Array, input: SsdStep, options: &SsdOptions) -> Result<()> {
    let check = Check::op("ssd_step");
    let SsdStep { x, dt, a, b, c } = input;
    for (name, array) in [("state", state), ("x", x), ("dt", dt), ("a", a), ("b", b), ("c", c)] {
        check.floating(name, array)?;
    }
    check.shape("x", x, axes!["B", "H", "P"])?;
    let [batch, heads, size] = [x.dim(0), x.dim(1), x.dim(2)];
    check.shape("dt", dt, axes![batch, heads])?;
    check.shape("a", a, axes![heads])?;
    check.shape("b", b, axes![batch, "G", "N"])?;
    check.same_shape("c", c, b)?;
    let groups = b.dim(1);
    let divides = groups > 0 && heads % groups == 0;
    check.value(divides, "b", format_args!("have groups that divide the {heads} heads"), groups)?;
    check.shape("state", state, axes![batch, heads, size, b.dim(2)])?;
    if let Some(z) = options.z {
        check.floating("z", z)?;
        check.same_shape("z", z, x)?;
    }
    check_heads(check, options, [heads, size])
}
