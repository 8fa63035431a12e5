//! Attention of one step on a layer: its tokens go to blocks, and its queries see what the blocks hold then.

use mlx_rs::Array;

use super::{
    held::{self, Held},
    kv::{CHECK, PagedKv},
    step::PagedStep,
    tokens::Tokens,
    way::Way,
};
use crate::{
    attention::FlashAttentionOptions,
    check::axes,
    dispatch::Context,
    error::{Error, Result},
    kernel::Sole,
};

/// Refuses what no row can heed.
pub(super) fn check(queries: &Array, options: &FlashAttentionOptions) -> Result<()> {
    let none = "be none over blocks of a pool";
    CHECK.value(options.mask.is_none(), "mask", none, "one")?;
    CHECK.value(options.segments.is_none(), "segments", none, "some")?;
    CHECK.value(options.dropout.is_none(), "dropout", none, "one")?;
    let heads = options.layout.dims(queries)[2];
    options.alibi_slopes.map_or(Ok(()), |slopes| CHECK.shape("alibi_slopes", slopes, axes![heads]))
}

/// A step on one layer.
pub(super) struct Appended {
    /// The blocks with its tokens.
    pub(super) held: [Held; 2],
    /// What its queries see.
    pub(super) attended: Array,
    /// Whether a kernel writes the tokens where they go.
    pub(super) in_place: bool,
}

/// The blocks with the tokens of a step written, and what their queries see in them. The tokens are in the layout of `options`.
/// A kernel writes them where it may, but not again in one step: that would write what the first time may not have read yet.
pub(super) fn append_and_attend(
    tokens: &Tokens,
    kv: &PagedKv,
    step: &PagedStep,
    options: &FlashAttentionOptions,
) -> Result<Appended> {
    let context = Context::current()?;
    let held = kv.held();
    let way = Way::of(held, step, options, &context);
    let sole = kv.writes_in_place(step, &context).filter(|_| !kv.has_applied(step));
    let after_queries = || way.clone().after_queries(held, step, options, &context);
    if let Some((sole, way)) = sole.zip(after_queries()) {
        match in_place(tokens, held, step, options, &way, sole) {
            Err(Error::Unavailable { .. }) => (),
            attended => {
                return Ok(Appended { held: held.clone(), attended: attended?, in_place: true });
            }
        }
    }
    let [queries, keys, values] = &tokens.turned(step, kv.turns_alike(&context))?;
    let held = with_tokens(&kv.copied(step)?, step, [keys, values])?;
    let [rows, _, heads, size] = options.layout.dims(queries);
    let attended = way.attend(&queries.reshape(&[rows, heads, size])?, &held, step, options)?;
    Ok(Appended { held, attended, in_place: false })
}

/// The blocks with the tokens of a step written: copies, where somebody else holds them.
pub(super) fn with_tokens(
    [keys, values]: &[Held; 2],
    step: &PagedStep,
    [of_keys, of_values]: [&Array; 2],
) -> Result<[Held; 2]> {
    Ok([keys.with_tokens(step, of_keys)?, values.with_tokens(step, of_values)?])
}

/// Attends to blocks into which a kernel writes the tokens first, in a way that comes after the queries.
fn in_place(
    tokens: &Tokens,
    held: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
    way: &Way,
    sole: Sole,
) -> Result<Array> {
    let queries = if tokens.may_turn_in_passing() {
        let rows = [tokens.queries, tokens.keys, tokens.values];
        held::write_in_place(rows, tokens.turning()?.as_ref(), step, held, sole)?
    } else {
        let rows = tokens.turned(step, false)?;
        held::write_in_place(rows.each_ref(), None, step, held, sole)?
    };
    way.attend(&queries, held, step, options)
}
