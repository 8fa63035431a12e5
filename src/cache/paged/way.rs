//! How one step attends to blocks.

use std::ops::Range;

use mlx_rs::{Array, Dtype};

use super::{dense::Dense, held::Held, step::PagedStep};
use crate::{
    attention::{
        BlockForm, FlashAttentionOptions, PagedAttentionOptions, flash_attention,
        paged_attention_in_order,
    },
    dispatch::{Backend, Context, Dispatch, Target},
    error::{Error, Result},
    layout::Layout,
};

const BY_KERNEL: Dispatch = Dispatch::Only(Backend::Kernel);

/// How a step attends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
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
    /// The one for such blocks, and what is asked for.
    pub(super) fn of(
        held: &[Held; 2],
        step: &PagedStep,
        options: &FlashAttentionOptions,
        context: &Context,
    ) -> Self {
        let auto = options.dispatch == Dispatch::Auto;
        // A host that acts out kernels on a CPU does so for tests.
        let gathers = context.target == Target::Cpu || context.obstacle.is_some();
        if auto && gathers {
            return Self::Gathered;
        }
        let by_mlx = auto || options.dispatch == Dispatch::Only(Backend::Builtin);
        let fits = held.iter().all(|held| is_fused_by_mlx(held) || !auto && is_plain(held));
        match &step.run {
            Some(slots) if by_mlx && fits && asks_little(options) => Self::Run(slots.clone()),
            _ if auto => Self::BlocksOrGathered,
            _ => Self::Blocks(options.dispatch),
        }
    }

    /// The same, if one operation takes queries and blocks together, so that it waits for whatever made the queries. On an NVIDIA
    /// GPU MLX's does, and copies no keys before, for few queries of heads of which it has a kernel.
    pub(super) fn after_queries(
        self,
        [keys, values]: &[Held; 2],
        step: &PagedStep,
        options: &FlashAttentionOptions,
        context: &Context,
    ) -> Option<Self> {
        // Where they do not matter, nothing is made of them.
        if options.scale == Some(0.0) {
            return None;
        }
        let [size, value_size] = [keys, values].map(|held| held.shape()[3]);
        match self {
            Self::Run(_) => {
                let has_kernel = is_fused_by_mlx(keys) && [64, 96, 128].contains(&size);
                let few = step.rows() < 4;
                let waits = context.target == Target::Cuda && has_kernel && few;
                (waits && size == value_size).then_some(self)
            }
            Self::Gathered => None,
            Self::Blocks(dispatch) => (dispatch == BY_KERNEL).then_some(self),
            Self::BlocksOrGathered => Some(Self::Blocks(BY_KERNEL)),
        }
    }

    /// What queries `[T, H, D]` see in blocks with the tokens of the step, a row for each token in the layout of `options`.
    pub(super) fn attend(
        &self,
        queries: &Array,
        held: &[Held; 2],
        step: &PagedStep,
        options: &FlashAttentionOptions,
    ) -> Result<Array> {
        let seen = match self {
            Self::Run(slots) => over_run(queries, held, slots.clone(), options)?,
            Self::Gathered => over_gathered(queries, held, step, options)?,
            &Self::Blocks(dispatch) => over_blocks(queries, held, step, options, dispatch)?,
            Self::BlocksOrGathered => match over_blocks(queries, held, step, options, BY_KERNEL) {
                Err(Error::Unavailable { .. }) => over_gathered(queries, held, step, options)?,
                seen => seen?,
            },
        };
        let [.., value_size] = held[1].shape();
        let [rows, heads] = [0, 1].map(|axis| queries.dim(axis));
        Ok(seen.reshape(&options.layout.shape([rows, 1, heads, value_size]))?)
    }
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

/// Of `[T, H, D]` over keys that lie one after another, `[1, T, H, D_v]`, or `[1, H, 1, D_v]` of one token, which is a sequence
/// in any layout.
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

/// The same over keys that are gathered.
fn over_gathered(
    queries: &Array,
    held: &[Held; 2],
    step: &PagedStep,
    options: &FlashAttentionOptions,
) -> Result<Array> {
    let dense = step.dense.get_or_init(|| Dense::new(&step.spans, step.block_size, step.rows()));
    dense.attend(queries, held, options)
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
        Ok(Way::of(&[held.clone(), held], &step, options, context))
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
        way: Way,
        options: &FlashAttentionOptions,
    ) -> Result<bool> {
        let mut pool = PagedPool::new(PagedPoolOptions::new(8))?;
        let id = pool.open(&[], b"")?;
        pool.append(id, &vec![1; rows])?;
        let step = pool.step(&[id], 0)?;
        let [keys, values] =
            sizes.map(|size| Held::zeros(BlockForm::Plain, [8, 16, 2, size], dtype));
        Ok(way.after_queries(&[keys?, values?], &step, options, context).is_some())
    }

    #[test]
    fn tokens_are_written_in_place_only_where_attention_waits_for_the_queries() -> Result<()> {
        let none = FlashAttentionOptions::default();
        let (cuda, half) = (on(Target::Cuda), (Dtype::Bfloat16, [128; 2]));
        assert!(follows(&cuda, half, 3, RUN, &none)?);
        assert!(!follows(&cuda, half, 4, RUN, &none)?, "an older GPU copies keys for so many");
        assert!(!follows(&on(Target::Metal), half, 1, RUN, &none)?);
        for held in
            [(Dtype::Float32, [128; 2]), (Dtype::Float16, [80; 2]), (Dtype::Float16, [128, 64])]
        {
            assert!(!follows(&cuda, held, 1, RUN, &none)?, "{held:?}: MLX attends by plain ops");
        }
        for (way, expected) in [
            (Way::Gathered, false),
            (Way::Blocks(BY_KERNEL), true),
            (Way::Blocks(Dispatch::Only(Backend::Reference)), false),
            (Way::BlocksOrGathered, true),
        ] {
            for target in [Target::Cpu, Target::Cuda, Target::Metal] {
                assert_eq!(
                    follows(&on(target), half, 9, way.clone(), &none)?,
                    expected,
                    "{way:?} on {target:?}"
                );
            }
        }
        let unscaled = FlashAttentionOptions { scale: Some(0.0), ..none };
        assert!(!follows(&cuda, half, 1, RUN, &unscaled)?, "no query matters");
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
