//! What a caller gives and may ask for.

use mlx_rs::Array;

use crate::{
    check::{Axis, Check, axes},
    dispatch::{Backend, Context, Dispatch, Dispatched},
    error::Result,
    scan::{fading::kernel, segments},
};

/// What [`ssd_scan`](super::ssd_scan) scans; its documentation says what each is.
#[derive(Debug, Clone, Copy)]
pub struct SsdInput<'a> {
    /// `[B, L, H, P]`
    pub x: &'a Array,
    /// `[B, L, H]`
    pub dt: &'a Array,
    /// `[H]`
    pub a: &'a Array,
    /// `[B, L, G, N]`
    pub b: &'a Array,
    /// `[B, L, G, N]`
    pub c: &'a Array,
}

/// Options of [`ssd_scan`](super::ssd_scan).
#[derive(Debug, Clone, Copy)]
pub struct SsdOptions<'a> {
    /// Steps that the reference takes together: more make more work, fewer more memory for states. Default: 64.
    pub chunk_size: i32,
    /// `[H]` or `[H, P]`: how much of `x` is added to the result. Default: nothing.
    pub d: Option<&'a Array>,
    /// `[B, L, H, P]`: a gate, of which the result is multiplied by the silu. Default: none.
    pub z: Option<&'a Array>,
    /// `[H]`: added to `dt`. Default: nothing.
    pub dt_bias: Option<&'a Array>,
    /// Whether steps are the softplus of `dt`. Default: no.
    pub dt_softplus: bool,
    /// The shortest and the longest step, which `dt` is cut to in the end. Default: any.
    pub dt_limit: Option<(f32, f32)>,
    /// `[B, H, P, N]`: the state before the first step; there may be none with segments. Default: zero.
    pub initial_state: Option<&'a Array>,
    /// Sequences of several lengths one after another along `L`, as
    /// [`ScanOptions::segments`](crate::scan::ScanOptions::segments), each of which begins with nothing. A NaN or an infinity in
    /// one may reach all that come after it. Default: one.
    pub segments: Option<&'a [i32]>,
    /// Which backend runs it. Default: `Auto`.
    pub dispatch: Dispatch,
}

impl SsdOptions<'_> {
    /// The default of [`SsdOptions::chunk_size`].
    pub const DEFAULT_CHUNK_SIZE: i32 = 64;
}

impl Default for SsdOptions<'_> {
    fn default() -> Self {
        Self {
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            d: None,
            z: None,
            dt_bias: None,
            dt_softplus: false,
            dt_limit: None,
            initial_state: None,
            segments: None,
            dispatch: Dispatch::Auto,
        }
    }
}

/// A checked call.
pub(super) struct Problem<'a> {
    pub(super) input: SsdInput<'a>,
    pub(super) options: SsdOptions<'a>,
    /// `B`, `L`, `H`, `P`
    pub(super) sizes: [i32; 4],
    pub(super) groups: i32,
    pub(super) state_size: i32,
    segments: Option<i32>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(input: SsdInput<'a>, options: &SsdOptions<'a>) -> Result<Self> {
        let check = Check::op(Self::OP);
        let SsdInput { x, dt, a, b, c } = input;
        for (name, array) in [("x", x), ("dt", dt), ("a", a), ("b", b), ("c", c)] {
            check.floating(name, array)?;
        }
        check.shape("x", x, axes!["B", "L", "H", "P"])?;
        let sizes = [x.dim(0), x.dim(1), x.dim(2), x.dim(3)];
        let [batch, length, heads, size] = sizes;
        check.shape("dt", dt, axes![batch, length, heads])?;
        check.shape("a", a, axes![heads])?;
        check.shape("b", b, axes![batch, length, "G", "N"])?;
        check.same_shape("c", c, b)?;
        check.dtype_among("c", c, &[b.dtype()])?;
        check.last_axis("b", b)?;
        let groups = b.dim(2);
        let divides = groups > 0 && heads % groups == 0;
        check.value(
            divides,
            "b",
            format_args!("have groups that divide the {heads} heads"),
            groups,
        )?;
        check.at_least("chunk_size", options.chunk_size, 1)?;
        check_heads(check, options, [heads, size])?;
        if let Some(z) = options.z {
            check.floating("z", z)?;
            check.same_shape("z", z, x)?;
        }
        let segments = segments::along(check, options.segments, length)?;
        let problem =
            Self { input, options: *options, sizes, groups, state_size: b.dim(3), segments };
        if let Some(state) = options.initial_state {
            let alone = options.segments.is_none();
            check.value(alone, "initial_state", "be none where there are segments", "one")?;
            check.floating("initial_state", state)?;
            let axes: Vec<_> = problem.state_shape().into_iter().map(Axis::Is).collect();
            check.shape("initial_state", state, &axes)?;
        }
        Ok(problem)
    }

    pub(super) fn state_shape(&self) -> Vec<i32> {
        let [batch, _, heads, size] = self.sizes;
        let rest = [heads, size, self.state_size];
        [batch].into_iter().chain(self.segments).chain(rest).collect()
    }
}

impl Dispatched for Problem<'_> {
    const OP: &'static str = "ssd_scan";

    fn choose(&self, context: &Context) -> Backend {
        let kernel =
            kernel::wins(self.input.x, context) && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => Some("MLX has no such scan"),
            Backend::Kernel if self.options.segments.is_some() => {
                Some("the kernel knows no segments")
            }
            Backend::Kernel => context
                .obstacle
                .or_else(|| kernel::refusal(self.input.b, self.input.x, context.target)),
            Backend::Reference => None,
        }
    }
}

/// What a head or all steps have in common.
pub(super) fn check_heads(
    check: Check,
    options: &SsdOptions,
    [heads, size]: [i32; 2],
) -> Result<()> {
    if let Some(skip) = options.d {
        check.floating("d", skip)?;
        let whole = axes![heads, size];
        check.shape("d", skip, if skip.ndim() == 1 { &whole[..1] } else { whole })?;
    }
    if let Some(bias) = options.dt_bias {
        check.floating("dt_bias", bias)?;
        check.shape("dt_bias", bias, axes![heads])?;
    }
    if let Some((low, high)) = options.dt_limit {
        let found = format_args!("{low} to {high}").to_string();
        check.value(low <= high, "dt_limit", "be a range", found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mlx_rs::Dtype;

    use super::*;
    use crate::{config::Settings, target::Target};

    fn chosen(
        sizes: [i32; 5],
        dtype: Dtype,
        target: Target,
        segments: Option<&[i32]>,
    ) -> Option<Backend> {
        let [batch, length, heads, size, state] = sizes;
        let zeros =
            |shape: &[i32]| Array::zeros::<f32>(shape).and_then(|zeros| zeros.as_dtype(dtype));
        let x = zeros(&[batch, length, heads, size]).ok()?;
        let dt = zeros(&[batch, length, heads]).ok()?;
        let (a, b) = (zeros(&[heads]).ok()?, zeros(&[batch, length, 1, state]).ok()?);
        let options = SsdOptions { segments, ..Default::default() };
        let input = SsdInput { x: &x, dt: &dt, a: &a, b: &b, c: &b };
        let problem = Problem::new(input, &options).ok()?;
        let context = Context { target, obstacle: None, settings: Settings::default() };
        Some(problem.choose(&context))
    }

    #[test]
    fn many_rows_of_states_are_the_kernels_on_an_nvidia_gpu() {
        use Backend::{Kernel, Reference};
        let of = |sizes, dtype| chosen(sizes, dtype, Target::Cuda, None);
        assert_eq!(of([1, 64, 32, 64, 128], Dtype::Bfloat16), Some(Kernel));
        assert_eq!(of([1, 4096, 31, 64, 128], Dtype::Bfloat16), Some(Reference));
        assert_eq!(of([1, 64, 32, 64, 257], Dtype::Bfloat16), Some(Reference));
        assert_eq!(of([4, 64, 32, 64, 128], Dtype::Float32), Some(Kernel));
        assert_eq!(of([1, 64, 32, 64, 128], Dtype::Float32), Some(Reference));
        let large = [8, 64, 32, 64, 128];
        let of = |target, segments| chosen(large, Dtype::Bfloat16, target, segments);
        assert_eq!(of(Target::Metal, None), Some(Reference), "not measured there");
        assert_eq!(of(Target::Cuda, Some(&[0, 64])), Some(Reference));
        let nothing = [i32::MAX, 0, i32::MAX, i32::MAX, 1];
        assert_eq!(chosen(nothing, Dtype::Float32, Target::Cuda, None), Some(Reference));
    }
}
