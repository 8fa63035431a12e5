//! Linear attention that replaces what it has stored for a key.

mod inverse;
mod step;

pub use step::gated_delta_rule_step;

use mlx_rs::{Array, Dtype, ops::concatenate};

use self::inverse::unit_lower_inverse;
use super::{
    fading::{Chunks, Layout},
    gated_linear::{GatedLinearOptions, Problem},
};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatched, NO_KERNEL},
    error::Result,
};

/// Reads, for each query, a memory in which each key has had its value replaced, by the share `beta`.
///
/// With `R = decay_t · S_{t−1}`: `S_t = R + β_t · k_t (v_t − Rᵀ k_t)ᵀ` and `y_t = scale · q_t S_t`. Keys are taken as they are; a
/// memory is stable for those of length 1 and `β` from 0 to 2. Without decays that is the delta rule.
///
/// # Shapes
/// - `queries`, `keys`: `[B, L, H, D]`, f32, f16 or bf16, of one dtype
/// - `values`: `[B, L, H, D_v]`, the same dtype
/// - `beta`: `[B, L, H]`, f32, f16 or bf16
/// - result: `[B, L, H, D_v]`, the same dtype as the values
///
/// # Errors
/// Those of [`gated_linear_attention`](super::gated_linear_attention), when `beta` is not as above, or when
/// [`GatedLinearOptions::log_decay`] has a decay for each element of a key.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearOptions, gated_delta_rule};
/// use mlx_rs::{Array, array};
///
/// // Of two values for one key the second is what is found.
/// let key = Array::ones::<f32>(&[1, 2, 1, 1])?;
/// let values = array!([3.0, 5.0]).reshape(&[1, 2, 1, 1])?;
/// let beta = Array::ones::<f32>(&[1, 2, 1])?;
/// let y = gated_delta_rule(&key, &key, values, beta, GatedLinearOptions::default())?;
/// assert!(y.flatten(None, None)?.all_close(array!([3.0, 5.0]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Reference`: plain MLX ops in f32, except that a GPU rounds scaled queries to their dtype. The updates of a chunk, of
/// [`GatedLinearOptions::chunk_size`] steps rounded up to a power of two, are solved by one triangular inverse; chunks run one
/// after another.
///
/// Yang, Kautz and Hatamizadeh, [Gated Delta Networks](https://arxiv.org/abs/2412.06464), 2024; Yang et al., [Parallelizing
/// Linear Transformers with the Delta Rule over Sequence Length](https://arxiv.org/abs/2406.06484), 2024.
pub fn gated_delta_rule(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    beta: impl AsRef<Array>,
    options: GatedLinearOptions<'_>,
) -> Result<Array> {
    Ok(gated_delta_rule_with_state(queries, keys, values, beta, options)?.0)
}

/// [`gated_delta_rule`], and the state after the last step, from which a call for what follows or [`gated_delta_rule_step`]
/// goes on.
///
/// # Shapes
/// Those of [`gated_delta_rule`], and
/// - state: `[B, H, D, D_v]`, f32; with segments `[B, N, H, D, D_v]`, zero for an empty one
///
/// # Errors
/// Those of [`gated_delta_rule`], under its name.
///
/// # Example
/// ```
/// use mlx_primitives::scan::{GatedLinearOptions, gated_delta_rule_with_state};
/// use mlx_rs::Array;
///
/// let (x, beta) = (Array::ones::<f32>(&[1, 3, 2, 4])?, Array::ones::<f32>(&[1, 3, 2])?);
/// let (_, state) = gated_delta_rule_with_state(&x, &x, &x, beta, GatedLinearOptions::default())?;
/// assert_eq!(state.shape(), [1, 2, 4, 4]);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn gated_delta_rule_with_state(
    queries: impl AsRef<Array>,
    keys: impl AsRef<Array>,
    values: impl AsRef<Array>,
    beta: impl AsRef<Array>,
    options: GatedLinearOptions<'_>,
) -> Result<(Array, Array)> {
    let (check, beta) = (Check::op(Delta::OP), beta.as_ref());
    let arrays = [queries.as_ref(), keys.as_ref(), values.as_ref()];
    let problem = Problem::new(check, arrays, options)?;
    let [batch, length, heads, ..] = problem.sizes;
    check.floating("beta", beta)?;
    check.shape("beta", beta, axes![batch, length, heads])?;
    if let Some(decay) = options.log_decay.filter(|decay| decay.ndim() == 4) {
        check.shape("log_decay", decay, axes![batch, length, heads])?;
    }
    options.dispatch.resolve(&Delta)?;
    if let Some(nothing) = problem.nothing()? {
        return Ok(nothing);
    }
    let layout = problem.layout();
    let layout =
        Layout { chunk: layout.chunk.unsigned_abs().next_power_of_two().cast_signed(), ..layout };
    let chunks = widened(problem.chunks(&layout)?)?;
    let beta = layout.split(&beta.as_dtype(Dtype::Float32)?.expand_dims(-1)?)?;
    let results = run(&chunks, &beta, &problem.state(&layout)?)?;
    problem.joined(&layout, results)
}

struct Delta;

impl Dispatched for Delta {
    const OP: &'static str = "gated_delta_rule";

    fn choose(&self, _: &Context) -> Backend {
        Backend::Reference
    }

    fn refusal(&self, backend: Backend, _: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => Some("MLX has no delta rule"),
            Backend::Kernel => Some(NO_KERNEL),
            Backend::Reference => None,
        }
    }
}

fn widened(chunks: Chunks) -> Result<Chunks> {
    let wide = |array: Array| array.as_dtype(Dtype::Float32);
    Ok(Chunks {
        queries: wide(chunks.queries)?,
        keys: wide(chunks.keys)?,
        values: wide(chunks.values)?,
        fade: chunks.fade,
    })
}

/// As [`Chunks::run`], with what is really written in place of values.
fn run(chunks: &Chunks, beta: &Array, state: &Array) -> Result<[Array; 2]> {
    let Chunks { queries, keys, values, fade } = chunks;
    let alike = keys.matmul(keys.swap_axes(-1, -2)?)?;
    let replaced = alike.multiply(fade.between(&fade.visible(1)?)?)?.multiply(beta)?;
    let solved = unit_lower_inverse(&replaced)?;
    // What would be written to an empty memory, and how it depends on the one before the chunk.
    let alone = solved.matmul(values.multiply(beta)?)?;
    let recalled = solved.matmul(keys.multiply(fade.since_start()?)?.multiply(beta)?)?;
    let kept = keys.multiply(fade.to_end()?)?.swap_axes(-1, -2)?;
    let count = keys.dim(3);
    let split = |array: &Array| array.split_equal(count, 3);
    let (alone, recalled, kept) = (split(&alone)?, split(&recalled)?, split(&kept)?);
    let through = split(&fade.through()?)?;
    let mut state = state.expand_dims(3)?;
    let (mut states, mut written) = (Vec::new(), Vec::new());
    for (((alone, recalled), kept), through) in alone.iter().zip(&recalled).zip(&kept).zip(&through)
    {
        let own = alone.subtract(recalled.matmul(&state)?)?;
        let next = state.multiply(through)?.add(kept.matmul(&own)?)?;
        states.push(std::mem::replace(&mut state, next));
        written.push(own);
    }
    let (states, written) = (concatenate(&states, 3)?, concatenate(&written, 3)?);
    let near = fade.scores(queries, keys)?.matmul(&written)?;
    let read = fade.read_beside(&near, queries, &states, Dtype::Float32)?;
    let last = match &fade.places {
        Some(places) => places.states(fade, [keys, &written, &states])?,
        None => state.squeeze_axes(&[3])?,
    };
    Ok([read, last])
}
