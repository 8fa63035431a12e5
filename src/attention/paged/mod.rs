//! Attention over keys and values that lie in blocks of a pool.

mod form;
pub(crate) mod in_place;
mod kernel;
mod problem;
mod reference;

pub use form::BlockForm;
pub(crate) use in_place::KERNELS as IN_PLACE_KERNELS;
pub(crate) use kernel::KERNELS;

use mlx_rs::Array;

use self::problem::Problem;
use super::flash::Window;
use crate::{
    dispatch::{Backend, Dispatch},
    error::Result,
};

/// Options of [`paged_attention`].
#[derive(Debug, Clone)]
pub struct PagedAttentionOptions<'a> {
    /// `[N + 1]`, i32: sequence `n` has the queries `query_starts[n]..query_starts[n + 1]`, as many as it likes or none.
    /// The numbers must not fall, and start at 0; queries after the last belong to no sequence. They are not read here:
    /// others give any numbers as a result, and nothing worse. Default: one query each, so that `T = N`.
    pub query_starts: Option<&'a Array>,
    /// What the products of queries and keys are multiplied by: any finite number. Default: `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// Bends scores into `(−c, c)` by `c · tanh(score / c)`: finite and above zero. Default: none.
    pub soft_cap: Option<f32>,
    /// `[H]`, f32, f16 or bf16: the slope times the distance from the key beside a query is taken from a score. Default:
    /// none.
    pub alibi_slopes: Option<&'a Array>,
    /// Whether a query sees no key after the one beside it. The last query of a sequence stands beside its last key.
    /// Default: yes.
    pub causal: bool,
    /// How far from the key beside it a query sees. Default: without end.
    pub window: Window,
    /// `[H]`, f32, f16 or bf16: the score of a further key in each head that has no value. Default: none.
    pub sinks: Option<&'a Array>,
    /// `[BLOCKS, BLOCK, H_kv]` or `[BLOCKS, 1, H_kv]`, f32: what the numbers of key blocks of 8 bits are multiplied by, one for
    /// each token and head, or one for each block and head. Such blocks must have them, others must not.
    pub key_scales: Option<&'a Array>,
    /// Those of value blocks, likewise.
    pub value_scales: Option<&'a Array>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for PagedAttentionOptions<'_> {
    fn default() -> Self {
        Self {
            query_starts: None,
            scale: None,
            soft_cap: None,
            alibi_slopes: None,
            causal: true,
            window: Window::default(),
            sinks: None,
            key_scales: None,
            value_scales: None,
            dispatch: Dispatch::Auto,
        }
    }
}

/// Attends to keys and values that lie in blocks, for sequences of any lengths at once: new tokens of some and whole
/// stretches of prompts of others in one call.
///
/// Sequence `n` has the keys `0..context_lengths[n]`, the tokens of its queries included: key `j` is at `j % BLOCK` in the
/// block `block_tables[n, j / BLOCK]` of the pool. Its queries stand beside its last keys. A query that sees no key, as
/// one of a sequence without a context, yields zero.
///
/// What the arrays of integers say is not read here. Entries of a table beyond a sequence's last block are never read, and
/// neither are the slots of that block beyond its context; an entry that names no block stands for the nearest that there
/// is; contexts longer than their table end with it.
///
/// # Shapes
/// - `queries`: `[T, H, D]`, f32, f16 or bf16, those of a sequence one after another
/// - `key_blocks`: `[BLOCKS, BLOCK, H_kv, D]`, of the dtype that a [`BlockForm`] has; `H` is a multiple of `H_kv`. A token of
///   all heads is contiguous, so that it is appended by one copy; any strides will do, such as those of a slice of a pool
///   of all layers
/// - `value_blocks`: `[BLOCKS, BLOCK, H_kv, D_v]`, in the same form or in another
/// - `block_tables`: `[N, W]`, i32
/// - `context_lengths`: `[N]`, i32
/// - result: `[T, H, D_v]`, of the dtype of `queries`
///
/// # Errors
/// When an array has another shape or dtype than these, when `T` is not `N` and there are no `query_starts`, when `H` is
/// not a multiple of `H_kv`, when blocks of 8 bits have no scales or others have some, or when an option does not have
/// the shape, dtype or range that [`PagedAttentionOptions`] gives it.
/// [`Error::Unavailable`](crate::Error::Unavailable) when `dispatch` asks for a backend that cannot run.
///
/// # Example
/// ```
/// use mlx_primitives::attention::{PagedAttentionOptions, paged_attention};
/// use mlx_rs::Array;
///
/// // Two sequences of 3 and 5 tokens in a pool of 4 blocks of 4.
/// let pool = Array::ones::<f32>(&[4, 4, 2, 64])?;
/// let tables = Array::from_slice(&[2, 0, 3, 1], &[2, 2]);
/// let lengths = Array::from_slice(&[3, 5], &[2]);
/// let queries = Array::ones::<f32>(&[2, 8, 64])?;
/// let y = paged_attention(&queries, &pool, &pool, &tables, &lengths, PagedAttentionOptions::default())?;
/// assert!(y.all_close(&queries, None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// `Kernel` reads each block where it lies, once for every 8 or 16 query heads that share it, and needs next to no memory;
/// its gradient is that of the reference. `Reference` gathers the blocks of each query into an
/// array of `T · W · BLOCK` keys. MLX has no op for it.
///
/// Kwon et al., [Efficient Memory Management for Large Language Model Serving with
/// PagedAttention](https://arxiv.org/abs/2309.06180), 2023.
pub fn paged_attention(
    queries: impl AsRef<Array>,
    key_blocks: impl AsRef<Array>,
    value_blocks: impl AsRef<Array>,
    block_tables: impl AsRef<Array>,
    context_lengths: impl AsRef<Array>,
    options: PagedAttentionOptions<'_>,
) -> Result<Array> {
    let blocks = [key_blocks.as_ref(), value_blocks.as_ref()];
    let (tables, lengths) = (block_tables.as_ref(), context_lengths.as_ref());
    let problem = in_any_order(queries.as_ref(), blocks, tables, lengths, &options)?;
    attend(&problem, options.dispatch)
}

/// [`paged_attention`], and the logarithm of what each query's weights were divided by, sinks included.
///
/// # Shapes
/// Those of [`paged_attention`], and
/// - `lse`: `[T, H]`, f32; −∞, or the sink, where a query sees no key
///
/// # Errors
/// Those of [`paged_attention`], under its name.
pub fn paged_attention_with_lse(
    queries: impl AsRef<Array>,
    key_blocks: impl AsRef<Array>,
    value_blocks: impl AsRef<Array>,
    block_tables: impl AsRef<Array>,
    context_lengths: impl AsRef<Array>,
    options: PagedAttentionOptions<'_>,
) -> Result<(Array, Array)> {
    let blocks = [key_blocks.as_ref(), value_blocks.as_ref()];
    let (tables, lengths) = (block_tables.as_ref(), context_lengths.as_ref());
    let problem = in_any_order(queries.as_ref(), blocks, tables, lengths, &options)?;
    let [output, lse] = match options.dispatch.resolve(&problem)? {
        _ if problem.is_empty() => problem.nothing(),
        Backend::Kernel => kernel::attend_with_lse(&problem),
        Backend::Builtin | Backend::Reference => {
            reference::attend(&problem.operands.as_ref(), &problem.rule)
        }
    }?;
    Ok((output, lse))
}

/// [`paged_attention`] where the host knows that `query_starts` do not fall.
pub(crate) fn paged_attention_in_order(
    queries: &Array,
    blocks: [&Array; 2],
    block_tables: &Array,
    context_lengths: &Array,
    options: &PagedAttentionOptions<'_>,
) -> Result<Array> {
    let problem = Problem::new(queries, blocks, block_tables, context_lengths, options)?;
    attend(&problem, options.dispatch)
}

/// A problem whose `query_starts` are the caller's, and may fall.
fn in_any_order(
    queries: &Array,
    blocks: [&Array; 2],
    tables: &Array,
    lengths: &Array,
    options: &PagedAttentionOptions,
) -> Result<Problem> {
    let problem = Problem::new(queries, blocks, tables, lengths, options)?;
    match options.query_starts {
        Some(_) => problem.with_rising_starts(),
        None => Ok(problem),
    }
}

fn attend(problem: &Problem, dispatch: Dispatch) -> Result<Array> {
    let [output, _] = match dispatch.resolve(problem)? {
        _ if problem.is_empty() => problem.nothing(),
        Backend::Kernel => return kernel::attend(problem),
        Backend::Builtin | Backend::Reference => {
            reference::attend(&problem.operands.as_ref(), &problem.rule)
        }
    }?;
    Ok(output)
}
