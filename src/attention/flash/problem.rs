//! A checked call, and what is read off it before anything is computed.

use mlx_rs::{
    Array, Dtype,
    ops::{broadcast_to, zeros_dtype},
};

use super::{
    blocks,
    dims::Dims,
    kernel,
    options::{AttentionDropout, FlashAttentionOptions, Segments, Window},
};
use crate::{
    check::{Check, axes},
    dispatch::{Backend, Context, Dispatched, Target},
    error::{Error, Result},
    layout::Layout,
    uploads,
};

/// Fewer queries or keys were not timed beside MLX's op where it holds all scores.
const SHORTEST: i32 = 1024;

const NO_LSE: &str = "MLX's fused attention gives no log-sum-exp";

/// The refusal of a backend that answered without it.
pub(super) fn no_lse() -> Error {
    let (op, backend) = (Problem::OP, Backend::Builtin);
    Error::Unavailable { op, backend, reason: NO_LSE.to_owned() }
}

/// Everything a backend reads. No array is evaluated, and none copied.
pub(super) struct Problem<'a> {
    /// `[B, H, S_q, D]`, whatever the layout.
    pub(super) queries: Array,
    /// `[B, H_kv, S_kv, D]`.
    pub(super) keys: Array,
    /// `[B, H_kv, S_kv, D_v]`.
    pub(super) values: Array,
    pub(super) dims: Dims,
    /// Of queries, keys, values and result.
    pub(super) dtype: Dtype,
    pub(super) scale: f32,
    pub(super) soft_cap: Option<f32>,
    /// `[H]` or `[B, H]`.
    pub(super) alibi_slopes: Option<&'a Array>,
    pub(super) mask: Option<&'a Array>,
    /// With causality as a `right` of 0. A side that hides nothing is `None`.
    pub(super) window: Window,
    pub(super) segments: Option<Segments<'a>>,
    /// `[H]`.
    pub(super) sinks: Option<&'a Array>,
    /// `None` if it leaves out nothing.
    pub(super) dropout: Option<AttentionDropout<'a>>,
    /// Whether the log-sum-exp is asked for.
    pub(super) wants_lse: bool,
    /// That of the caller's arrays.
    pub(super) layout: Layout,
}

/// What a backend answers.
pub(super) struct Attended {
    /// `[B, H, S_q, D_v]`.
    pub(super) output: Array,
    /// `[B, H, S_q]`, f32, if it was asked for.
    pub(super) lse: Option<Array>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(
        [queries, keys, values]: [&Array; 3],
        options: &FlashAttentionOptions<'a>,
        wants_lse: bool,
    ) -> Result<Self> {
        let check = Check::op(Self::OP);
        let layout = options.layout;
        let dims = Dims::new(check, [queries, keys, values], layout)?;
        let dtype = dims.dtype;
        let scale = options.scale.unwrap_or_else(|| (dims.size as f32).sqrt().recip());
        check.finite("scale", scale)?;
        check_options(check, options, &dims)?;
        Ok(Self {
            queries: layout.swap_with_bhsd(queries)?,
            keys: layout.swap_with_bhsd(keys)?,
            values: layout.swap_with_bhsd(values)?,
            dtype,
            scale,
            soft_cap: options.soft_cap,
            alibi_slopes: options.alibi_slopes,
            mask: options.mask,
            window: dims.window(options.causal, options.window),
            segments: options.segments,
            sinks: options.sinks,
            dropout: options.dropout.filter(|dropout| dropout.probability > 0.0),
            wants_lse,
            layout,
            dims,
        })
    }

    /// Whether there is nothing to average, or nothing to fill. MLX is not asked then.
    pub(super) fn is_empty(&self) -> bool {
        let no_segment = self.segments.is_some_and(|segments| segments.queries.size() < 2);
        let no_value = self.dims.value_size == 0 && !self.wants_lse;
        self.dims.scores().contains(&0) || no_segment || no_value
    }

    /// The result where no query sees a key.
    pub(super) fn nothing(&self) -> Result<Attended> {
        Ok(Attended {
            output: zeros_dtype(&self.dims.result(), self.dtype)?,
            lse: self.wants_lse.then(|| self.empty_lse()).transpose()?,
        })
    }

    /// The log-sum-exp over no key.
    fn empty_lse(&self) -> Result<Array> {
        let shape = &self.dims.scores()[..3];
        Ok(match self.sinks_by_row()? {
            Some(sinks) => broadcast_to(sinks.squeeze_axes(&[-1])?, shape)?,
            None => broadcast_to(uploads::float(f32::NEG_INFINITY), shape)?,
        })
    }

    /// `[1, H, 1, 1]`, f32.
    pub(super) fn sinks_by_row(&self) -> Result<Option<Array>> {
        let by_row = |sinks: &Array| {
            Ok(sinks.as_dtype(Dtype::Float32)?.reshape(&[1, self.dims.heads, 1, 1])?)
        };
        self.sinks.map(by_row).transpose()
    }

    /// Whether scores are the products and nothing but causality, if that, hides a key.
    pub(super) fn is_plain(&self) -> bool {
        let hides = self.hides_by_place() || self.mask.is_some();
        !hides && self.alibi_slopes.is_none()
    }

    /// Whether more than causality hides keys by where they are.
    fn hides_by_place(&self) -> bool {
        let Window { left, right } = self.window;
        left.is_some() || right.is_some_and(|right| right > 0) || self.segments.is_some()
    }

    /// Whether a kernel was measured to be faster than MLX's fused op, or than plain ops where that does not serve.
    fn kernel_wins(&self, context: &Context) -> bool {
        let half = self.dtype != Dtype::Float32;
        let long = self.dims.query_length.min(self.dims.key_length) >= SHORTEST;
        let op = match kernel::splits_keys(self) {
            true if half => "decode_attention",
            true => return false,
            false if self.is_served(context.target) => return false,
            false if half && self.beyond_the_fused_op().is_some() => "flash_attention beyond MLX's",
            false if !long => return false,
            false if !half => "flash_attention in f32",
            false => Self::OP,
        };
        context.kernel_wins(op, self.keys.size())
    }

    /// Whether MLX's fused op holds no scores in memory, and does nothing that is hidden: it runs as plain ops for
    /// f32 and for other heads, and takes a window as a mask.
    fn is_served(&self, target: Target) -> bool {
        let half = self.dtype != Dtype::Float32;
        let small = self.dims.size.max(self.dims.value_size) <= 128;
        let fused = target == Target::Cuda && half && small;
        fused && !self.hides_by_place() && self.beyond_the_fused_op().is_none()
    }

    /// Gives a result its layout.
    pub(super) fn in_layout(&self, attended: Attended) -> Result<Attended> {
        Ok(Attended { output: self.layout.swap_with_bhsd(&attended.output)?, ..attended })
    }

    /// What MLX's op has no argument for.
    fn beyond_the_fused_op(&self) -> Option<&'static str> {
        let rounds = |array: &Array| ![Dtype::Float32, array.dtype()].contains(&self.dtype);
        [
            (self.wants_lse, NO_LSE),
            (self.soft_cap.is_some(), "MLX's fused attention has no soft cap"),
            (self.dropout.is_some(), "MLX's fused attention has no dropout"),
            (
                self.alibi_slopes.is_some() && self.dtype != Dtype::Float32,
                "MLX's fused attention would round distances to the dtype",
            ),
            (
                self.sinks.is_some_and(rounds),
                "MLX's fused attention takes sinks of the dtype of the queries",
            ),
        ]
        .into_iter()
        .find_map(|(holds, reason)| holds.then_some(reason))
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "flash_attention";

    fn choose(&self, context: &Context) -> Backend {
        let target = context.target;
        // All scores would be in memory at once, and few in a cache.
        let many = !self.is_served(target) && blocks::pay(self, target);
        // On a GPU also blocks of them are, as many as MLX has handed over.
        let by_kernel = self.kernel_wins(context) || many && target == Target::Cuda;
        match (target, self.dtype) {
            // There MLX multiplies half precision without BLAS and rounds the scores to it.
            (Target::Cpu, Dtype::Float16 | Dtype::Bfloat16) => Backend::Reference,
            _ if by_kernel && self.refusal(Backend::Kernel, context).is_none() => Backend::Kernel,
            _ if many => Backend::Reference,
            _ if self.beyond_the_fused_op().is_some() => Backend::Reference,
            _ => Backend::Builtin,
        }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => self.beyond_the_fused_op(),
            Backend::Kernel => context.obstacle.or_else(|| kernel::refusal(self)),
            Backend::Reference => None,
        }
    }
}

/// Checks what is asked beside queries, keys and values.
fn check_options(check: Check, options: &FlashAttentionOptions, dims: &Dims) -> Result<()> {
    if let Some(soft_cap) = options.soft_cap {
        check.positive("soft_cap", soft_cap)?;
    }
    if let Some(slopes) = options.alibi_slopes {
        check.floating("alibi_slopes", slopes)?;
        let by_batch = slopes.ndim() == 2;
        let axes = [dims.batch.into(), dims.heads.into()];
        check.shape("alibi_slopes", slopes, if by_batch { &axes } else { &axes[1..] })?;
    }
    if let Some(mask) = options.mask {
        check.mask(mask, &dims.scores())?;
    }
    options.window.check(check)?;
    if let Some(segments) = options.segments {
        check_segments(check, segments, dims)?;
    }
    if let Some(sinks) = options.sinks {
        check.floating("sinks", sinks)?;
        check.shape("sinks", sinks, axes![dims.heads])?;
    }
    options.dropout.map_or(Ok(()), |dropout| check_dropout(check, dropout))
}

fn check_segments(check: Check, Segments { queries, keys }: Segments, dims: &Dims) -> Result<()> {
    check.dtype_among("segments.queries", queries, &[Dtype::Int32])?;
    check.dtype_among("segments.keys", keys, &[Dtype::Int32])?;
    check.shape("segments.queries", queries, axes!["N + 1"])?;
    check.value(queries.size() > 0, "segments.queries", "have at least one number", 0)?;
    check.shape("segments.keys", keys, axes![queries.dim(0)])?;
    check.value(dims.batch == 1, "queries", "have a batch of 1 with segments", dims.batch)
}

fn check_dropout(check: Check, dropout: AttentionDropout) -> Result<()> {
    let AttentionDropout { probability, key } = dropout;
    let holds = (0.0..1.0).contains(&probability);
    check.value(holds, "dropout.probability", "be at least 0 and below 1", probability)?;
    check.dtype_among("dropout.key", key, &[Dtype::Uint32])?;
    check.shape("dropout.key", key, axes![2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn chosen(
        target: Target,
        dtype: Dtype,
        options: &FlashAttentionOptions,
        lse: bool,
    ) -> Option<Backend> {
        let x = Array::from_slice(&[0.0_f32; 4], &[1, 1, 1, 4]).as_dtype(dtype).ok()?;
        let problem = Problem::new([&x, &x, &x], options, lse).ok()?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        Some(problem.choose(&context))
    }

    fn on_cuda(problem: &Problem) -> Backend {
        let (target, settings) = (Target::Cuda, Settings::default());
        problem.choose(&Context { target, obstacle: None, settings })
    }

    #[test]
    fn half_precision_on_a_cpu_goes_around_the_fused_op() {
        use Backend::{Builtin, Reference};
        for (target, dtype, expected) in [
            (Target::Cpu, Dtype::Float32, Builtin),
            (Target::Cpu, Dtype::Float16, Reference),
            (Target::Cpu, Dtype::Bfloat16, Reference),
            (Target::Metal, Dtype::Float16, Builtin),
            (Target::Cuda, Dtype::Bfloat16, Builtin),
        ] {
            let chosen = chosen(target, dtype, &Default::default(), false);
            assert_eq!(chosen, Some(expected), "{target:?} {dtype:?}");
        }
    }

    #[test]
    fn long_sequences_on_a_cpu_go_in_blocks() {
        let chosen = |target, length| {
            let x = Array::zeros::<f32>(&[1, length, 1, 4]).ok()?;
            let problem = Problem::new([&x, &x, &x], &Default::default(), false).ok()?;
            let context = Context { target, obstacle: None, settings: Settings::default() };
            Some(problem.choose(&context))
        };
        assert_eq!(chosen(Target::Cpu, 2048), Some(Backend::Builtin));
        assert_eq!(chosen(Target::Cpu, 2049), Some(Backend::Reference));
        assert_eq!(chosen(Target::Metal, 2049), Some(Backend::Builtin));
    }

    #[test]
    fn on_an_nvidia_gpu_kernels_do_what_the_fused_op_cannot() {
        use Backend::{Builtin, Kernel, Reference};
        let chosen = |length, window, lse| {
            let x =
                Array::zeros::<f32>(&[1, length, 8, 64]).ok()?.as_dtype(Dtype::Bfloat16).ok()?;
            let options = FlashAttentionOptions { window, ..Default::default() };
            let problem = Problem::new([&x, &x, &x], &options, lse).ok()?;
            Some(on_cuda(&problem))
        };
        let (all, few) = (Window::default(), Window { left: Some(9), right: Some(0) });
        assert_eq!(chosen(512, all, true), Some(Kernel));
        assert_eq!(chosen(511, all, true), Some(Reference));
        assert_eq!(chosen(512, all, false), Some(Builtin));
        assert_eq!(chosen(512, few, false), Some(Builtin));
        assert_eq!(chosen(1 << 15, few, false), Some(Kernel));
    }

    #[test]
    fn on_an_nvidia_gpu_many_scores_of_f32_are_the_kernels() {
        let chosen = |length, size| {
            let x = Array::zeros::<f32>(&[1, length, 1, size]).ok()?;
            let problem = Problem::new([&x, &x, &x], &Default::default(), false).ok()?;
            Some(on_cuda(&problem))
        };
        assert_eq!(chosen(1 << 14, 4), Some(Backend::Builtin));
        assert_eq!(chosen(1 << 15, 4), Some(Backend::Kernel));
        assert_eq!(chosen(1 << 15, 257), Some(Backend::Reference), "no kernel has such heads");
    }

    #[test]
    fn long_keys_of_f32_are_the_kernels_where_no_limit_of_a_launch_is_in_the_way() {
        let chosen = |queries: [i32; 4], keys: [i32; 4], mask: Option<&Array>| {
            let queries = Array::zeros::<f32>(&queries).ok()?;
            let keys = Array::zeros::<f32>(&keys).ok()?;
            let options = FlashAttentionOptions { mask, ..Default::default() };
            let problem = Problem::new([&queries, &keys, &keys], &options, false).ok()?;
            Some(on_cuda(&problem))
        };
        let many = [1, 1024, 8, 64];
        assert_eq!(chosen(many, many, None), Some(Backend::Kernel));
        assert_eq!(chosen([1, 1023, 8, 64], many, None), Some(Backend::Builtin));
        assert_eq!(chosen(many, [1, 1023, 8, 64], None), Some(Backend::Builtin));
        assert_eq!(chosen([1, 1024, 7, 64], [1, 1024, 7, 64], None), Some(Backend::Builtin));
        let sequences = [70_000, 64, 1, 4];
        assert_eq!(chosen(sequences, sequences, None), Some(Backend::Reference));
        let long = [1, 46_400, 1, 4];
        let none = broadcast_to(uploads::float(0.0), &[1, 1, 46_400, 46_400]).ok();
        assert_eq!(chosen(long, long, none.as_ref()), Some(Backend::Reference));
    }

    #[test]
    fn what_the_fused_op_cannot_do_goes_around_it() {
        let on_cuda = |options, lse| chosen(Target::Cuda, Dtype::Bfloat16, &options, lse);
        let none = FlashAttentionOptions::default;
        let (slopes, key) =
            (Array::from_slice(&[0.5_f32], &[1]), Array::from_slice(&[1_u32; 2], &[2]));
        let dropout = |probability| Some(AttentionDropout { probability, key: &key });
        let window = Window { left: Some(0), right: Some(0) };
        let reference = Some(Backend::Reference);
        let builtin = Some(Backend::Builtin);
        assert_eq!(on_cuda(FlashAttentionOptions { window, ..none() }, false), builtin);
        assert_eq!(
            on_cuda(FlashAttentionOptions { dropout: dropout(0.0), ..none() }, false),
            builtin
        );
        assert_eq!(
            on_cuda(FlashAttentionOptions { dropout: dropout(0.5), ..none() }, false),
            reference
        );
        assert_eq!(
            on_cuda(FlashAttentionOptions { soft_cap: Some(2.0), ..none() }, false),
            reference
        );
        for alibi_slopes in [Some(&slopes), None] {
            let sinks = alibi_slopes.is_none().then_some(&slopes);
            let options = FlashAttentionOptions { alibi_slopes, sinks, ..none() };
            assert_eq!(on_cuda(options.clone(), false), reference);
            assert_eq!(chosen(Target::Cuda, Dtype::Float32, &options, false), builtin);
        }
        assert_eq!(on_cuda(none(), true), reference);
    }
}
