//! Attention of one step over blocks.

use std::ops::Range;

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, zeros_dtype},
};

use super::{
    dense::{Call, Dense, Rows},
    held::{self, Held},
    kv::{CHECK, PagedKv},
    step::PagedStep,
};
use crate::{
    attention::{
        BlockForm, FlashAttentionOptions, PagedAttentionOptions, Window, flash_attention,
        paged_attention_in_order,
    },
    check::axes,
    dispatch::{Backend, Context, Dispatch, Target},
    error::{Error, Result},
    kernel::Sole,
    layout::Layout,
    rope::{RopeOptions, Turning, rope_qk},
    uploads,
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

/// The queries, keys and values of a step, a row for each token.
pub(super) struct Tokens<'a> {
    pub(super) queries: &'a Array,
    pub(super) keys: &'a Array,
    pub(super) values: &'a Array,
    /// How queries and keys turn first, if they do.
    pub(super) rope: Option<RopeOptions>,
}

impl Tokens<'_> {
    /// With queries and keys turned. By a kernel if they are to turn `alike`, whose angles are those of the one that writes
    /// tokens in place, unless another op was asked for.
    fn turned(&self, step: &PagedStep, alike: bool) -> Result<[Array; 3]> {
        let Some(rope) = &self.rope else {
            return Ok([self.queries, self.keys, self.values].map(Array::clone));
        };
        let turned = |dispatch| {
            let rope = RopeOptions { dispatch, ..rope.clone() };
            rope_qk(self.queries, self.keys, step.positions(), rope)
        };
        let alike = alike && rope.dispatch == Dispatch::Auto;
        let by_kernel = alike.then(|| turned(Dispatch::Only(Backend::Kernel)));
        let (queries, keys) = match by_kernel {
            None | Some(Err(Error::Unavailable { .. })) => turned(rope.dispatch)?,
            Some(turned) => turned?,
        };
        Ok([queries, keys, self.values.clone()])
    }

    /// How a kernel turns them, if it is to.
    fn turning(&self) -> Result<Option<Turning>> {
        let size = self.queries.dim(-1);
        self.rope.clone().map(|rope| Turning::new(CHECK, rope, size)).transpose()
    }

    /// Whether a kernel may turn them in passing, or has nothing to turn.
    fn may_turn_in_passing(&self) -> bool {
        let asked = self.rope.as_ref().map(|rope| rope.dispatch);
        matches!(asked, None | Some(Dispatch::Auto | Dispatch::Only(Backend::Kernel)))
    }
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
/// A kernel writes them where it may, but not `again` in one step: that would write what the first time may not have read yet.
pub(super) fn append_and_attend(
    tokens: &Tokens,
    kv: &PagedKv,
    step: &PagedStep,
    options: &FlashAttentionOptions,
    again: bool,
) -> Result<Appended> {
    let context = Context::current()?;
    let held = kv.held();
    let way = way(held, step, options, &context);
    let follows = !again && way.follows_queries(held, step, options, &context);
    if let Some(sole) = kv.writes_in_place(step, &context).filter(|_| follows) {
        match in_place(tokens, held, step, options, &way, sole) {
            Err(Error::Unavailable { .. }) => (),
            attended => {
                return Ok(Appended { held: held.clone(), attended: attended?, in_place: true });
            }
        }
    }
    let [queries, keys, values] = &tokens.turned(step, kv.turns_alike(&context))?;
    let held = with_tokens(&kv.copied(step)?, step, [keys, values])?;
    let attended = attend(queries, &held, step, options, way)?;
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

/// Attends to blocks into which a kernel writes the tokens first, by a way that takes queries and blocks together.
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
    let attended = match way {
        Way::Run(slots) => over_run(&queries, held, slots.clone(), options)?,
        _ => over_blocks(&queries, held, step, options, Dispatch::Only(Backend::Kernel))?,
    };
    in_layout(&attended, &queries, held, options.layout)
}

/// Of `queries`, a row for each token in the layout of `options`, over the blocks of a step whose tokens are written.
fn attend(
    queries: &Array,
    held: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
    way: Way,
) -> Result<Array> {
    match way {
        Way::Run(slots) => {
            in_rows(queries, held, options, |rows| over_run(rows, held, slots.clone(), options))
        }
        Way::Gathered => {
            in_rows(queries, held, options, |rows| over_gathered(rows, held, step, options))
        }
        Way::Blocks(dispatch) => {
            in_rows(queries, held, options, |rows| over_blocks(rows, held, step, options, dispatch))
        }
        Way::BlocksOrGathered => in_rows(queries, held, options, |rows| {
            match over_blocks(rows, held, step, options, Dispatch::Only(Backend::Kernel)) {
                Err(Error::Unavailable { .. }) => over_gathered(rows, held, step, options),
                attended => attended,
            }
        }),
    }
}

/// How a step attends.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// By MLX's op over the slots of the one sequence that there is, which need neither tables nor a copy.
    Run(Range<i32>),
    /// By MLX's op over keys that are gathered first.
    Gathered,
    /// By attention over blocks.
    Blocks(Dispatch),
    /// By its kernel, and where that refuses, over gathered keys.
    BlocksOrGathered,
}

impl Way {
    /// Whether one operation takes queries and blocks together, so that it waits for whatever made the queries. On an NVIDIA GPU
    /// MLX's does, and copies no keys before, for few queries of heads of which it has a kernel.
    fn follows_queries(
        &self,
        [keys, values]: &[Held; 2],
        step: &PagedStep,
        options: &FlashAttentionOptions,
        context: &Context,
    ) -> bool {
        // Where they do not matter, nothing is made of them.
        if options.scale == Some(0.0) {
            return false;
        }
        let [size, value_size] = [keys, values].map(|held| held.shape()[3]);
        match self {
            Self::Run(_) => {
                let has_kernel = is_fused_by_mlx(keys) && [64, 96, 128].contains(&size);
                let few = step.rows() < 4;
                context.target == Target::Cuda && has_kernel && size == value_size && few
            }
            Self::Gathered => false,
            Self::Blocks(dispatch) => *dispatch == Dispatch::Only(Backend::Kernel),
            Self::BlocksOrGathered => true,
        }
    }
}

fn way(
    held: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
    context: &Context,
) -> Way {
    let auto = options.dispatch == Dispatch::Auto;
    // A host that acts out kernels on a CPU does so for tests.
    let gathers = context.target == Target::Cpu || context.obstacle.is_some();
    if auto && gathers {
        return Way::Gathered;
    }
    let by_mlx = auto || options.dispatch == Dispatch::Only(Backend::Builtin);
    let fits = held.iter().all(|held| is_fused_by_mlx(held) || !auto && is_plain(held));
    match &step.run {
        Some(slots) if by_mlx && fits && asks_little(options) => Way::Run(slots.clone()),
        _ if auto => Way::BlocksOrGathered,
        _ => Way::Blocks(options.dispatch),
    }
}

/// Attends with `[T, H, D]` of queries that are a row for each token in the layout of `options`, as what they see is.
fn in_rows(
    queries: &Array,
    held: &[Held; 2],
    options: &FlashAttentionOptions,
    attend: impl Fn(&Array) -> Result<Array>,
) -> Result<Array> {
    let [rows, _, heads, size] = options.layout.dims(queries);
    let queries = queries.reshape(&[rows, heads, size])?;
    in_layout(&attend(&queries)?, &queries, held, options.layout)
}

/// What queries `[T, H, D]` see, a row for each token in this layout.
fn in_layout(
    attended: &Array,
    queries: &Array,
    [_, values]: &[Held; 2],
    layout: Layout,
) -> Result<Array> {
    let [.., value_size] = values.shape();
    Ok(attended.reshape(&layout.shape([queries.dim(0), 1, queries.dim(1), value_size]))?)
}

fn is_plain(held: &Held) -> bool {
    held.form() == BlockForm::Plain
}

/// Whether MLX attends to such keys, or values, without all scores in memory, on every GPU.
fn is_fused_by_mlx(held: &Held) -> bool {
    let [.., size] = held.shape();
    is_plain(held) && held.dtype() != Dtype::Float32 && size <= 128
}

/// Whether MLX's own op knows all that is asked for.
fn asks_little(options: &FlashAttentionOptions) -> bool {
    let FlashAttentionOptions { soft_cap, alibi_slopes, window, sinks, .. } = options;
    let windowed = window.left.is_some() || window.right.is_some();
    soft_cap.is_none() && alibi_slopes.is_none() && sinks.is_none() && !windowed
}

/// What `[T, H, D]` see, row by row, of keys that lie one after another. One token alone is a sequence in any layout.
fn over_run(
    queries: &Array,
    [keys, values]: &[Held; 2],
    slots: Range<i32>,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let [tokens, heads, size] = [0, 1, 2].map(|axis| queries.dim(axis));
    let layout = if tokens == 1 { Layout::Bhsd } else { Layout::Bshd };
    let run = |held: &Held| -> Result<Array> {
        let run = held.run(slots.clone())?;
        Ok(if layout == Layout::Bshd { run } else { run.swap_axes(1, 2)? })
    };
    let queries = queries.reshape(&layout.shape([1, tokens, heads, size]))?;
    let of_run = FlashAttentionOptions { layout, ..options.clone() };
    flash_attention(queries, run(keys)?, run(values)?, of_run)
}

/// `[T, H, D_v]` of `[T, H, D]`.
fn over_blocks(
    queries: &Array,
    [keys, values]: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
    dispatch: Dispatch,
) -> Result<Array> {
    let [key_scales, value_scales] = [keys.scales()?, values.scales()?];
    let options = PagedAttentionOptions {
        query_starts: Some(&step.query_starts),
        scale: options.scale,
        soft_cap: options.soft_cap,
        alibi_slopes: options.alibi_slopes,
        causal: options.causal,
        window: options.window,
        sinks: options.sinks,
        key_scales: key_scales.as_ref(),
        value_scales: value_scales.as_ref(),
        dispatch,
    };
    let (tables, lengths) = (&step.block_tables, &step.context_lengths);
    let blocks = [&keys.blocks()?, &values.blocks()?];
    paged_attention_in_order(queries, blocks, tables, lengths, &options)
}

/// The same by attention over keys side by side: single tokens together, longer stretches one after another.
fn over_gathered(
    queries: &Array,
    held: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let options = FlashAttentionOptions { layout: Layout::Bhsd, ..options.clone() };
    let dense = step.dense.get_or_init(|| Dense::new(&step.spans, step.block_size, step.rows()));
    let mut parts = Vec::new();
    for call in &dense.calls {
        let queries = match &call.rows {
            Rows::Run(rows) => queries.try_index(rows.clone())?,
            Rows::Some(rows) => queries.take_axis(rows, 0)?,
        };
        parts.push(attend_in(call, &queries, held, &options)?);
    }
    let padding = step.rows() - step.token_rows();
    if padding > 0 {
        let shape = [padding, queries.dim(1), held[1].shape()[3]];
        parts.push(zeros_dtype(&shape, queries.dtype())?);
    }
    let rows = concatenate(&parts, 0)?;
    Ok(dense.places.as_ref().map_or(Ok(rows.clone()), |places| rows.take_axis(places, 0))?)
}

/// `[_, H, D_v]` of the queries of one call, `[_, H, D]`.
fn attend_in(
    call: &Call,
    queries: &Array,
    held: &[Held; 2],
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let [keys, values] = held;
    let (keys, values) = (gathered(keys, call)?, gathered(values, call)?);
    let options = FlashAttentionOptions { mask: call.mask.as_ref(), ..options.clone() };
    let [sequences, _, key_heads, _] = Layout::Bhsd.dims(&keys);
    let [rows, heads, size] = [0, 1, 2].map(|axis| queries.dim(axis));
    if rows > sequences {
        // Of one sequence, whose queries follow each other.
        let queries = queries.swap_axes(0, 1)?.expand_dims(0)?;
        let attended = flash_attention(queries, keys, values, options)?;
        return Ok(attended.squeeze_axes(&[0])?.swap_axes(0, 1)?);
    }
    let by_head = options.alibi_slopes.is_some() || options.sinks.is_some();
    let (queries, options) = if by_head || options.window.left.is_some() {
        (queries.expand_dims(2)?, options)
    } else {
        // The heads that share keys attend as if they were queries of one head: a CPU multiplies by each key once for all.
        let shape = [sequences, key_heads, heads / key_heads, size];
        let window = Window::default();
        (queries.reshape(&shape)?, FlashAttentionOptions { causal: false, window, ..options })
    };
    let value_size = values.dim(3);
    let attended = flash_attention(queries, keys, values, options)?;
    Ok(attended.reshape(&[rows, heads, value_size])?)
}

/// `[N, H_kv, S_kv, _]`, one head after another, which a CPU multiplies several times as fast as one token after another.
fn gathered(held: &Held, call: &Call) -> Result<Array> {
    let [.., heads, _] = held.shape();
    let head = uploads::integers((0..heads).collect()).expand_dims(-1)?;
    let rows = call.slots.multiply(uploads::int(heads))?.add(head)?;
    held.picked(|array| Ok(array.flatten(0, 2)?.take_axis(&rows, 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::Window,
        cache::{PagedPool, PagedPoolOptions},
        config::Settings,
    };

    const RUN: Way = Way::Run(16..19);

    fn on(target: Target) -> Context {
        Context { target, obstacle: None, settings: Settings::default() }
    }

    /// How three tokens of the first sequence of a pool attend, or two of each of two sequences.
    fn chosen(
        context: &Context,
        (form, dtype, size): (BlockForm, Dtype, i32),
        alone: bool,
        options: &FlashAttentionOptions,
    ) -> Result<Way> {
        let mut pool =
            PagedPool::new(PagedPoolOptions { block_size: 16, ..PagedPoolOptions::new(8) })?;
        let texts: &[&[u32]] = if alone { &[&[1, 2, 3]] } else { &[&[1, 2], &[3, 4]] };
        let mut ids = Vec::new();
        for text in texts {
            let id = pool.open(&[], b"")?;
            pool.append(id, text)?;
            ids.push(id);
        }
        let step = pool.step(&ids, 0)?;
        let held = Held::zeros(form, [8, 16, 2, size], dtype)?;
        Ok(way(&[held.clone(), held], &step, options, context))
    }

    #[test]
    fn auto_takes_mlx_for_a_sequence_alone_on_a_gpu() -> Result<()> {
        let none = FlashAttentionOptions::default();
        let half = (BlockForm::Plain, Dtype::Float16, 128);
        assert_eq!(chosen(&on(Target::Cuda), half, true, &none)?, RUN);
        assert_eq!(chosen(&on(Target::Metal), half, true, &none)?, RUN);
        let without_kernels = Context { obstacle: Some("none here"), ..on(Target::Metal) };
        assert_eq!(chosen(&without_kernels, half, true, &none)?, Way::Gathered);
        assert_eq!(chosen(&on(Target::Cpu), half, true, &none)?, Way::Gathered);
        assert_eq!(chosen(&on(Target::Cuda), half, false, &none)?, Way::BlocksOrGathered);
        for held in [
            (BlockForm::Plain, Dtype::Float32, 128),
            (BlockForm::Plain, Dtype::Float16, 136),
            (BlockForm::Int8, Dtype::Float16, 128),
        ] {
            assert_eq!(
                chosen(&on(Target::Cuda), held, true, &none)?,
                Way::BlocksOrGathered,
                "{held:?}"
            );
        }
        let window = Window { left: Some(4), right: None };
        for asking in [
            FlashAttentionOptions { soft_cap: Some(30.0), ..none.clone() },
            FlashAttentionOptions { window, ..none },
        ] {
            assert_eq!(chosen(&on(Target::Cuda), half, true, &asking)?, Way::BlocksOrGathered);
        }
        Ok(())
    }

    /// Whether a kernel may write `rows` tokens of one sequence in heads of these sizes, where they attend so.
    fn follows(
        context: &Context,
        (dtype, sizes): (Dtype, [i32; 2]),
        rows: usize,
        way: &Way,
        options: &FlashAttentionOptions,
    ) -> Result<bool> {
        let mut pool = PagedPool::new(PagedPoolOptions::new(8))?;
        let id = pool.open(&[], b"")?;
        pool.append(id, &vec![1; rows])?;
        let step = pool.step(&[id], 0)?;
        let [keys, values] =
            sizes.map(|size| Held::zeros(BlockForm::Plain, [8, 16, 2, size], dtype));
        Ok(way.follows_queries(&[keys?, values?], &step, options, context))
    }

    #[test]
    fn tokens_are_written_in_place_only_where_attention_waits_for_the_queries() -> Result<()> {
        let none = FlashAttentionOptions::default();
        let (cuda, half) = (on(Target::Cuda), (Dtype::Bfloat16, [128; 2]));
        assert!(follows(&cuda, half, 3, &RUN, &none)?);
        assert!(!follows(&cuda, half, 4, &RUN, &none)?, "an older GPU copies keys for so many");
        assert!(!follows(&on(Target::Metal), half, 1, &RUN, &none)?);
        for held in
            [(Dtype::Float32, [128; 2]), (Dtype::Float16, [80; 2]), (Dtype::Float16, [128, 64])]
        {
            assert!(!follows(&cuda, held, 1, &RUN, &none)?, "{held:?}: MLX attends by plain ops");
        }
        for (way, expected) in [
            (Way::Gathered, false),
            (Way::Blocks(Dispatch::Only(Backend::Kernel)), true),
            (Way::Blocks(Dispatch::Only(Backend::Reference)), false),
            (Way::BlocksOrGathered, true),
        ] {
            for target in [Target::Cpu, Target::Cuda, Target::Metal] {
                assert_eq!(
                    follows(&on(target), half, 9, &way, &none)?,
                    expected,
                    "{way:?} on {target:?}"
                );
            }
        }
        let unscaled = FlashAttentionOptions { scale: Some(0.0), ..none };
        assert!(!follows(&cuda, half, 1, &RUN, &unscaled)?, "no query matters");
        Ok(())
    }

    #[test]
    fn what_is_asked_for_is_taken() -> Result<()> {
        let single = (BlockForm::Plain, Dtype::Float32, 64);
        let only = |backend| FlashAttentionOptions {
            dispatch: Dispatch::Only(backend),
            ..Default::default()
        };
        for target in [Target::Cpu, Target::Cuda] {
            assert_eq!(chosen(&on(target), single, true, &only(Backend::Builtin))?, RUN);
            for backend in [Backend::Kernel, Backend::Reference] {
                let paged = Way::Blocks(Dispatch::Only(backend));
                assert_eq!(chosen(&on(target), single, true, &only(backend))?, paged);
            }
        }
        Ok(())
    }
}
