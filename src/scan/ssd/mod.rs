//! The scan of Mamba-2: one decay a head, states of matrices, chunks of matrix products.

mod kernel;
mod options;
mod step;

pub use options::{SsdInput, SsdOptions};
pub use step::{SsdStep, ssd_step};

use mlx_rs::{
    Array, Dtype,
    ops::{clip, logaddexp, sigmoid, zeros, zeros_dtype},
};

use self::options::Problem;
use super::fading::{Chunks, Fade, Layout, Pass, Places, operand};
use crate::{dispatch::Backend, error::Result, uploads};

/// Scans a sequence as Mamba-2 does: each head has a state `[P, N]` that fades by one number a step.
///
/// `S_t = exp(Δ_t · A) · S_{t−1} + Δ_t · x_t B_tᵀ` and `y_t = S_t C_t + D · x_t`, times `silu(z_t)` where there is a gate. `Δ` is
/// `dt`, with [`SsdOptions::dt_bias`] and the softplus if asked for.
///
/// # Shapes
/// - `x`: `[B, L, H, P]`, f32, f16 or bf16; here `P` is the size of a head and `N` that of its state
/// - `dt`: `[B, L, H]`; `a`: `[H]`, below zero for a state that fades; any of those dtypes
/// - `b`, `c`: `[B, L, G, N]`, of one dtype of those, where `H` is a multiple of `G`: head `h` takes group `h / (H / G)`
/// - result: the shape and dtype of `x`
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when `G` does not divide `H`, when a dtype is
/// not floating point, when an option does not have the shape, dtype or range that [`SsdOptions`] gives it, or when the one
/// backend that `dispatch` allows cannot take the problem.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{SsdInput, SsdOptions, ssd_scan};
/// use mlx_rs::{Array, array};
///
/// let ones = |shape: &[i32]| Array::ones::<f32>(shape);
/// let (x, dt, a, b) = (ones(&[1, 3, 1, 1])?, ones(&[1, 3, 1])?, array!([0.5_f32.ln()]), ones(&[1, 3, 1, 1])?);
/// let y = ssd_scan(SsdInput { x: &x, dt: &dt, a: &a, b: &b, c: &b }, SsdOptions::default())?;
/// assert!(y.flatten(None, None)?.all_close(array!([1.0, 1.5, 1.75]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Reference` is plain MLX ops: products of matrices within chunks of [`SsdOptions::chunk_size`] steps, and an
/// [`affine_scan`](super::affine_scan()) over chunks. `Kernel` is one pass that keeps the states in registers, in chunks of its
/// own; it knows no segments, no `N` above 256, and its gradient is that of the reference. States and exponentials are f32; on
/// a GPU, matrices are multiplied in the dtype of `x`, to which a state is rounded where it is read: in f16 it overflows beyond
/// 65504. `Auto` takes the kernel where it was measured to win.
///
/// Dao and Gu, [Transformers are SSMs](https://arxiv.org/abs/2405.21060), 2024.
pub fn ssd_scan(input: SsdInput<'_>, options: SsdOptions<'_>) -> Result<Array> {
    Ok(ssd_scan_with_state(input, options)?.0)
}

/// [`ssd_scan`], and the state after the last step, from which a scan of what follows or [`ssd_step`] goes on.
///
/// # Shapes
/// Those of [`ssd_scan`], and
/// - state: `[B, H, P, N]`, f32; with segments `[B, segments, H, P, N]`, zero for an empty one
///
/// # Errors
/// Those of [`ssd_scan`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{SsdInput, SsdOptions, ssd_scan_with_state};
/// use mlx_rs::{Array, array};
///
/// let ones = |shape: &[i32]| Array::ones::<f32>(shape);
/// let (x, dt, a, b) = (ones(&[1, 3, 2, 4])?, ones(&[1, 3, 2])?, array!([-1.0, -2.0]), ones(&[1, 3, 1, 8])?);
/// let input = SsdInput { x: &x, dt: &dt, a: &a, b: &b, c: &b };
/// let (_, state) = ssd_scan_with_state(input, SsdOptions::default())?;
/// assert_eq!(state.shape(), [1, 2, 4, 8]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn ssd_scan_with_state(input: SsdInput<'_>, options: SsdOptions<'_>) -> Result<(Array, Array)> {
    let problem = Problem::new(input, &options)?;
    match options.dispatch.resolve(&problem)? {
        _ if problem.is_empty() => problem.nothing(),
        Backend::Kernel => kernel::scan(&problem),
        Backend::Builtin | Backend::Reference => problem.by_reference(),
    }
}

impl Problem<'_> {
    fn is_empty(&self) -> bool {
        let [batch, length, heads, size] = self.sizes;
        [batch, length, heads, size, self.state_size].contains(&0)
    }

    /// No step, or no number to take one with.
    fn nothing(&self) -> Result<(Array, Array)> {
        let x = self.input.x;
        let y = zeros_dtype(x.shape(), x.dtype())?;
        let state = match self.options.initial_state {
            Some(state) => state.as_dtype(Dtype::Float32)?,
            None => zeros::<f32>(&self.state_shape())?,
        };
        Ok((y, state))
    }

    fn by_reference(&self) -> Result<(Array, Array)> {
        let SsdInput { x, a, b, c, .. } = self.input;
        let [batch, length, heads, _] = self.sizes;
        let groups = self.groups;
        let chunk = self.options.chunk_size.min(length);
        let layout = Layout { batch, length, groups, repeats: heads / groups, chunk };
        let dt = delta(self.input.dt, &self.options)?;
        let fading = dt.multiply(a.as_dtype(Dtype::Float32)?)?.expand_dims(-1)?;
        let places = self.options.segments.map(|segments| Places::new(segments, &layout));
        let operand = operand(x.dtype())?;
        let steps = layout.split(&dt.expand_dims(-1)?)?;
        let chunks = Chunks {
            queries: layout.split(&c.as_dtype(operand)?)?,
            keys: layout.split(&b.as_dtype(operand)?)?,
            values: Pass::Scaled.run(operand, &[layout.split(x)?, steps])?,
            fade: Fade::new(&layout.split(&fading)?, places.transpose()?)?,
        };
        let state = match self.options.initial_state {
            Some(state) => state.as_dtype(Dtype::Float32)?.swap_axes(-1, -2)?,
            None => zeros::<f32>(&[batch, heads, self.state_size, x.dim(3)])?,
        };
        // What nothing is done to any more may be rounded at once.
        let plain = self.options.d.is_none() && self.options.z.is_none();
        let dtype = if plain { x.dtype() } else { Dtype::Float32 };
        let [read, last] = chunks.run(&layout.grouped(&state)?, dtype)?;
        let y = finished(&layout.join(&read)?, &x.as_dtype(Dtype::Float32)?, &self.options)?;
        Ok((y.as_dtype(x.dtype())?, layout.ungrouped(&last)?.swap_axes(-1, -2)?))
    }
}

/// How long each step is, in f32: `dt` of `[..., H]`.
fn delta(dt: &Array, options: &SsdOptions) -> Result<Array> {
    let mut delta = dt.as_dtype(Dtype::Float32)?;
    if let Some(bias) = options.dt_bias {
        delta = delta.add(bias.as_dtype(Dtype::Float32)?)?;
    }
    if options.dt_softplus {
        delta = logaddexp(&delta, uploads::float(0.0))?;
    }
    if let Some((low, high)) = options.dt_limit {
        delta = clip(&delta, (low, high))?;
    }
    Ok(delta)
}

/// What was read, with the skip and the gate; all `[..., H, P]`, f32.
fn finished(read: &Array, x: &Array, options: &SsdOptions) -> Result<Array> {
    let mut y = read.clone();
    if let Some(skip) = options.d {
        let skip = skip.as_dtype(Dtype::Float32)?;
        let skip = if skip.ndim() == 1 { skip.expand_dims(-1)? } else { skip };
        y = y.add(x.multiply(skip)?)?;
    }
    if let Some(gate) = options.z {
        let gate = gate.as_dtype(Dtype::Float32)?;
        y = y.multiply(gate.multiply(sigmoid(&gate)?)?)?;
    }
    Ok(y)
}
