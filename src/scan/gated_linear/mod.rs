//! Linear attention whose state fades.

mod kernel;
mod step;

pub(super) use step::Step;
pub use step::{GatedLinearStep, gated_linear_attention_step};

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, zeros, zeros_dtype},
};

use super::{
    fading::{self, Chunks, Fade, Layout, Places, operand},
    segments,
};
use crate::{
    check::{Axis, Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    uploads,
};

/// Options of [`gated_linear_attention`].
#[derive(Debug, Clone, Copy)]
pub struct GatedLinearOptions<'a> {
    /// `[H]`, one decay for each head as in a retention ([`retention_log_decays`] gives them); `[B, L, H]`, one for each step
    /// too; or `[B, L, H, D]`, one for each element of a key: the logarithms of decays, 0 or below, f32, f16 or bf16. Those
    /// below −100 are taken for −100, which leaves nothing. Decays between two steps of a chunk are differences of sums in f32, so
    /// many such in a chunk cost its later decays digits: after ten in a chunk of 64 they are off by up to 1e-3. Default: 0, so
    /// that nothing fades.
    pub log_decay: Option<&'a Array>,
    /// What queries are multiplied by: finite. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Steps that the reference takes together. Default: 64.
    pub chunk_size: i32,
    /// `[B, H, D, D_v]`: the state before the first step; there may be none with segments. Default: zero.
    pub initial_state: Option<&'a Array>,
    /// Sequences of several lengths one after another, as
    /// [`ScanOptions::segments`](super::ScanOptions::segments), each of which begins with nothing. A NaN or an infinity in
    /// one may reach all that come after it. Default: one.
    pub segments: Option<&'a [i32]>,
    /// Which backend runs it. Default: `Auto`.
    pub dispatch: Dispatch,
}

impl GatedLinearOptions<'_> {
    /// The default of [`GatedLinearOptions::chunk_size`].
    pub const DEFAULT_CHUNK_SIZE: i32 = 64;
}

impl Default for GatedLinearOptions<'_> {
    fn default() -> Self {
        Self {
            log_decay: None,
            scale: None,
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            initial_state: None,
            segments: None,
            dispatch: Dispatch::Auto,
        }
    }
}

/// The logarithms of a retention's decays, `[H]` in f32: of head `h` that of `1 − 2^(−5 − h)`.
///
/// # Errors
/// When there is no head.
///
/// # Example
/// ```
/// use mlx_primitives::scan::retention_log_decays;
///
/// assert_eq!(retention_log_decays(2)?.as_slice::<f32>(), [0.96875_f32.ln(), 0.984375_f32.ln()]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// Sun et al., [Retentive Network](https://arxiv.org/abs/2307.08621), 2023.
pub fn retention_log_decays(heads: i32) -> Result<Array> {
    Check::op("retention_log_decays").at_least("heads", heads, 1)?;
    let decays = (0..heads).map(|head| (-(f64::from(-5 - head).exp2())).ln_1p() as f32);
    Ok(Array::from_slice(&decays.collect::<Vec<_>>(), &[heads]))
}

/// Reads, for each query, the values of all keys up to its own, each by how well the key fits and how much of it is left.
///
/// `S_t = decay_t · S_{t−1} + k_t v_tᵀ`, a decay being a number or one for each row of the state, and
/// `y_t = scale · q_t S_t`. Without decays that is causal linear attention without a normalizer, with one a head a retention.
///
/// # Shapes
/// - `queries`, `keys`: `[B, L, H, D]`, f32, f16 or bf16, of one dtype
/// - `values`: `[B, L, H, D_v]`, the same dtype
/// - result: `[B, L, H, D_v]`, the same dtype
///
/// # Errors
/// When an array has another rank or an axis that disagrees with the others, when the dtypes differ or are not floating
/// point, when an option does not have the shape, dtype or range that [`GatedLinearOptions`] gives it, or when the one backend
/// that `dispatch` allows cannot take the problem.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearOptions, gated_linear_attention, retention_log_decays};
/// use mlx_rs::Array;
///
/// let x = Array::ones::<f32>(&[1, 5, 4, 8])?;
/// let decays = retention_log_decays(4)?;
/// let options = GatedLinearOptions { log_decay: Some(&decays), ..Default::default() };
/// assert_eq!(gated_linear_attention(&x, &x, &x, options)?.shape(), [1, 5, 4, 8]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Reference` is plain MLX ops: products of matrices within chunks of [`GatedLinearOptions::chunk_size`] steps, and an
/// [`affine_scan`](super::affine_scan()) over chunks. Decays for each element of a key take, in parts of 16 steps, 16 numbers for
/// each of them. `Kernel` is one pass that keeps the states in registers, in chunks of its own; it knows neither such decays
/// nor segments nor keys beyond 256, and its gradient is that of the reference. States and exponentials are f32; on a GPU, half
/// precision is multiplied as it comes, and a state is rounded to it where it is read: in f16 it overflows beyond 65504. `Auto`
/// takes the kernel where it was measured to win.
///
/// Yang et al., [Gated Linear Attention Transformers with Hardware-Efficient
/// Training](https://arxiv.org/abs/2312.06635), 2023.
pub fn gated_linear_attention(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: GatedLinearOptions<'_>,
) -> Result<Array> {
    Ok(gated_linear_attention_with_state(queries, keys, values, options)?.0)
}

/// [`gated_linear_attention`], and the state after the last step, from which a call for what follows or
/// [`gated_linear_attention_step`] goes on.
///
/// # Shapes
/// Those of [`gated_linear_attention`], and
/// - state: `[B, H, D, D_v]`, f32; with segments `[B, N, H, D, D_v]`, zero for an empty one
///
/// # Errors
/// Those of [`gated_linear_attention`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearOptions, gated_linear_attention_with_state};
/// use mlx_rs::{Array, array};
///
/// let x = Array::ones::<f32>(&[1, 3, 1, 1])?;
/// let decay = array!([0.5_f32.ln()]);
/// let options = GatedLinearOptions { log_decay: Some(&decay), ..Default::default() };
/// let (_, state) = gated_linear_attention_with_state(&x, &x, &x, options)?;
/// assert!(state.all_close(array!(1.75), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn gated_linear_attention_with_state(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    options: GatedLinearOptions<'_>,
) -> Result<(Array, Array)> {
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let linear = Linear(Problem::new(Check::op(Linear::OP), arrays, options)?);
    let backend = options.dispatch.resolve(&linear)?;
    if let Some(nothing) = linear.0.nothing()? {
        return Ok(nothing);
    }
    match backend {
        Backend::Kernel => kernel::scan(&linear),
        Backend::Builtin | Backend::Reference => linear.by_reference(),
    }
}

/// A checked call, of this and of the gated delta rule.
pub(super) struct Problem<'a> {
    pub(super) arrays: [&'a Array; 3],
    options: GatedLinearOptions<'a>,
    /// `B`, `L`, `H`, `D`, `D_v`
    pub(super) sizes: [i32; 5],
    segments: Option<i32>,
    scale: f32,
}

impl<'a> Problem<'a> {
    pub(super) fn new(
        check: Check,
        arrays: [&'a Array; 3],
        options: GatedLinearOptions<'a>,
    ) -> Result<Self> {
        let [queries, keys, values] = arrays;
        let dtype = check.floating("queries", queries)?;
        check.shape("queries", queries, axes!["B", "L", "H", "D"])?;
        check.dtype_among("keys", keys, &[dtype])?;
        check.same_shape("keys", keys, queries)?;
        check.dtype_among("values", values, &[dtype])?;
        let [batch, length, heads, size] =
            [queries.dim(0), queries.dim(1), queries.dim(2), queries.dim(3)];
        check.shape("values", values, axes![batch, length, heads, "D_v"])?;
        check.at_least("chunk_size", options.chunk_size, 1)?;
        let scale = options.scale.unwrap_or_else(|| 1.0 / (size.max(1) as f32).sqrt());
        check.finite("scale", scale)?;
        if let Some(decay) = options.log_decay {
            check.floating("log_decay", decay)?;
            match decay.ndim() {
                1 => check.shape("log_decay", decay, axes![heads])?,
                3 => check.shape("log_decay", decay, axes![batch, length, heads])?,
                _ => check.shape("log_decay", decay, axes![batch, length, heads, size])?,
            }
        }
        let segments = segments::along(check, options.segments, length)?;
        let sizes = [batch, length, heads, size, values.dim(3)];
        let problem = Self { arrays, options, sizes, segments, scale };
        if let Some(state) = options.initial_state {
            let alone = options.segments.is_none();
            check.value(alone, "initial_state", "be none where there are segments", "one")?;
            check.floating("initial_state", state)?;
            let axes: Vec<_> = problem.state_shape().into_iter().map(Axis::Is).collect();
            check.shape("initial_state", state, &axes)?;
        }
        Ok(problem)
    }

    fn state_shape(&self) -> Vec<i32> {
        let [batch, _, heads, size, value_size] = self.sizes;
        [batch].into_iter().chain(self.segments).chain([heads, size, value_size]).collect()
    }

    pub(super) fn layout(&self) -> Layout {
        let [batch, length, heads, ..] = self.sizes;
        let chunk = self.options.chunk_size.min(length);
        Layout { batch, length, groups: heads, repeats: 1, chunk }
    }

    /// The result and the states where there is nothing to do, if there is nothing.
    pub(super) fn nothing(&self) -> Result<Option<(Array, Array)>> {
        if !self.sizes.contains(&0) {
            return Ok(None);
        }
        let values = self.arrays[2];
        let y = zeros_dtype(values.shape(), values.dtype())?;
        let state = match self.options.initial_state {
            Some(state) => state.as_dtype(Dtype::Float32)?,
            None => zeros::<f32>(&self.state_shape())?,
        };
        Ok(Some((y, state)))
    }

    /// Without segments: `[B, H, 1, D, D_v]`, f32.
    pub(super) fn state(&self, layout: &Layout) -> Result<Array> {
        let [batch, _, heads, size, value_size] = self.sizes;
        let state = match self.options.initial_state {
            Some(state) => state.as_dtype(Dtype::Float32)?,
            None => zeros::<f32>(&[batch, heads, size, value_size])?,
        };
        layout.grouped(&state)
    }

    pub(super) fn chunks(&self, layout: &Layout) -> Result<Chunks> {
        let [batch, length, heads, ..] = self.sizes;
        let logarithms = match self.options.log_decay {
            None => zeros::<f32>(&[batch, length, heads, 1])?,
            Some(decay) if decay.ndim() == 4 => decay.clone(),
            Some(decay) => {
                let of_steps = broadcast_to(decay, &[batch, length, heads])?;
                of_steps.expand_dims(-1)?
            }
        };
        let places = self.options.segments.map(|segments| Places::new(segments, layout));
        let [queries, keys, values] = self.arrays;
        let operand = operand(values.dtype())?;
        let queries = queries.as_dtype(Dtype::Float32)?.multiply(uploads::float(self.scale))?;
        Ok(Chunks {
            queries: layout.split(&queries.as_dtype(operand)?)?,
            keys: layout.split(&keys.as_dtype(operand)?)?,
            values: layout.split(&values.as_dtype(operand)?)?,
            fade: Fade::new(&layout.split(&logarithms)?, places.transpose()?)?,
        })
    }

    pub(super) fn joined(
        &self,
        layout: &Layout,
        [read, last]: [Array; 2],
    ) -> Result<(Array, Array)> {
        let y = layout.join(&read)?.as_dtype(self.arrays[2].dtype())?;
        Ok((y, layout.ungrouped(&last)?))
    }
}

/// A problem of this operation.
struct Linear<'a>(Problem<'a>);

impl Linear<'_> {
    fn by_reference(&self) -> Result<(Array, Array)> {
        let layout = self.0.layout();
        let dtype = self.0.arrays[2].dtype();
        let results = self.0.chunks(&layout)?.run(&self.0.state(&layout)?, dtype)?;
        self.0.joined(&layout, results)
    }
}

impl Dispatched for Linear<'_> {
    const OP: &'static str = "gated_linear_attention";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = fading::kernel::wins(self.0.arrays[2], context)
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        let GatedLinearOptions { log_decay, segments, .. } = self.0.options;
        match backend {
            Backend::Builtin => Some("MLX has no linear attention"),
            Backend::Kernel if segments.is_some() => Some("the kernel knows no segments"),
            Backend::Kernel if log_decay.is_some_and(|decay| decay.ndim() == 4) => {
                Some("the kernel has one decay for all of a key")
            }
            Backend::Kernel => {
                let [_, keys, values] = self.0.arrays;
                context.obstacle.or_else(|| fading::kernel::refusal(keys, values, context.target))
            }
            Backend::Reference => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Settings, target::Target};

    #[test]
    fn one_decay_a_head_is_the_kernels_on_an_nvidia_gpu() {
        let chosen = |heads, axes: usize, segments: Option<&[i32]>| {
            let shape = [4, 64, heads, 128];
            let x = zeros_dtype(&shape, Dtype::Bfloat16).ok()?;
            let decay = zeros::<f32>(&shape[..axes]).ok()?;
            let log_decay = (axes > 0).then_some(&decay);
            let options = GatedLinearOptions { log_decay, segments, ..Default::default() };
            let problem = Problem::new(Check::op(Linear::OP), [&x, &x, &x], options).ok()?;
            let context =
                Context { target: Target::Cuda, obstacle: None, settings: Settings::default() };
            Some(Linear(problem).choose(&context))
        };
        assert_eq!(chosen(16, 0, None), Some(Backend::Kernel));
        assert_eq!(chosen(16, 3, None), Some(Backend::Kernel));
        assert_eq!(chosen(16, 4, None), Some(Backend::Reference));
        assert_eq!(chosen(16, 3, Some(&[0, 64])), Some(Backend::Reference));
        assert_eq!(chosen(3, 0, None), Some(Backend::Reference), "too few rows of states");
    }
}
