//! A checked call, and what is read off it before anything is computed.

use mlx_rs::{
    Array, Dtype,
    ops::{zeros, zeros_dtype},
};

use super::{SelectiveScanOptions, kernel};
use crate::{
    check::{Axis, Check, axes},
    dispatch::{Backend, Context, Dispatched},
    error::Result,
    kernel::stand_in,
    scan::segments,
};

/// The arguments as they came.
pub(super) struct Given<'a> {
    pub(super) u: &'a Array,
    pub(super) delta: &'a Array,
    pub(super) a: &'a Array,
    pub(super) b: &'a Array,
    pub(super) c: &'a Array,
    pub(super) options: SelectiveScanOptions<'a>,
}

/// The arrays, in the order in which transforms see them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands<A> {
    /// `[B, L, D]`, as `delta` and `z`.
    pub(super) u: A,
    pub(super) delta: A,
    /// Unread unless gated.
    pub(super) z: A,
    /// `[D, N]`.
    pub(super) a: A,
    /// `[B, L, G, N]`, as `c`.
    pub(super) b: A,
    pub(super) c: A,
    /// `[D]`, unread without a skip.
    pub(super) d: A,
    /// `[D]`, unread unless biased.
    pub(super) bias: A,
    /// `[S, D, N]`, f32, unread unless started.
    pub(super) state: A,
}

impl Operands<Array> {
    pub(super) fn as_ref(&self) -> Operands<&Array> {
        let [u, delta, z, a, b, c, d, bias, state] = self.in_order();
        Operands { u, delta, z, a, b, c, d, bias, state }
    }

    pub(super) fn in_order(&self) -> [&Array; 9] {
        let Self { u, delta, z, a, b, c, d, bias, state } = self;
        [u, delta, z, a, b, c, d, bias, state]
    }
}

impl<'a> Operands<&'a Array> {
    pub(super) fn of(arrays: &'a [Array; 9]) -> Self {
        let [u, delta, z, a, b, c, d, bias, state] = arrays;
        Self { u, delta, z, a, b, c, d, bias, state }
    }
}

/// Which operands count, and where sequences begin.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) gated: bool,
    pub(super) skips: bool,
    pub(super) biased: bool,
    pub(super) softplus: bool,
    pub(super) started: bool,
    /// Of sequences laid one after another in a batch of one: `[S + 1]`. Without, a row of the batch is a sequence.
    pub(super) segments: Option<Vec<i32>>,
}

/// `[B, L, D]`, `G` and `N`, and the number of sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) batch: i32,
    pub(super) length: i32,
    pub(super) channels: i32,
    pub(super) groups: i32,
    pub(super) states: i32,
    pub(super) sequences: i32,
}

pub(super) struct Problem {
    pub(super) operands: Operands<Array>,
    pub(super) rule: Rule,
    pub(super) sizes: Sizes,
}

impl Problem {
    /// `u` is `[B, L, D]`.
    pub(super) fn of_sequences(given: &Given) -> Result<Self> {
        let check = Check::op(Self::OP);
        let dtype = check.floating("u", given.u)?;
        check.shape("u", given.u, axes!["B", "L", "D"])?;
        let channels = check.last_axis("u", given.u)?;
        check.same_shape("delta", given.delta, given.u)?;
        check.dtype_among("delta", given.delta, &[dtype])?;
        let [batch, length] = [given.u.dim(0), given.u.dim(1)];
        let [groups, states] = parameters(check, given, &[batch.into(), length.into()])?;
        let sequences = segments::count(check, given.options.segments, batch, length)?;
        let sizes = Sizes { batch, length, channels, groups, states, sequences };
        check_options(check, given, &sizes, "initial_state")?;
        Self::new(given, sizes)
    }

    /// `u` is `[B, D]`.
    pub(super) fn of_one_step(given: &Given) -> Result<Self> {
        let check = Check::op("selective_state_update");
        let dtype = check.floating("u", given.u)?;
        check.shape("u", given.u, axes!["B", "D"])?;
        let channels = check.last_axis("u", given.u)?;
        check.same_shape("delta", given.delta, given.u)?;
        check.dtype_among("delta", given.delta, &[dtype])?;
        let batch = given.u.dim(0);
        let [groups, states] = parameters(check, given, &[batch.into()])?;
        let sizes = Sizes { batch, length: 1, channels, groups, states, sequences: batch };
        check_options(check, given, &sizes, "state")?;
        Self::new(given, sizes)
    }

    /// Nothing is checked any more.
    fn new(given: &Given, sizes: Sizes) -> Result<Self> {
        let SelectiveScanOptions { d, z, delta_bias, initial_state, segments, .. } = given.options;
        let Sizes { batch, length, channels, groups, states, .. } = sizes;
        let by_channel = [batch, length, channels];
        let by_state = [batch, length, groups, states];
        let or_nothing =
            |array: Option<&Array>| array.cloned().unwrap_or_else(|| stand_in(Dtype::Float32, 1));
        let z = z.map(|z| z.reshape(&by_channel)).transpose()?;
        let operands = Operands {
            u: given.u.reshape(&by_channel)?,
            delta: given.delta.reshape(&by_channel)?,
            a: given.a.clone(),
            b: given.b.reshape(&by_state)?,
            c: given.c.reshape(&by_state)?,
            d: or_nothing(d),
            z: or_nothing(z.as_ref()),
            bias: or_nothing(delta_bias),
            state: or_nothing(initial_state),
        };
        let rule = Rule {
            gated: z.is_some(),
            skips: d.is_some(),
            biased: delta_bias.is_some(),
            softplus: given.options.delta_softplus,
            started: initial_state.is_some(),
            segments: segments.map(<[i32]>::to_vec),
        };
        Ok(Self { operands, rule, sizes })
    }

    /// Whether there is no step to take.
    pub(super) fn is_empty(&self) -> bool {
        self.operands.u.size() == 0 || self.sizes.sequences == 0
    }

    /// The results where there is none.
    pub(super) fn nothing(&self) -> Result<[Array; 2]> {
        let Sizes { channels, states, sequences, .. } = self.sizes;
        let u = &self.operands.u;
        let state = match self.rule.started {
            true => self.operands.state.clone(),
            false => zeros::<f32>(&[sequences, channels, states])?,
        };
        Ok([zeros_dtype(u.shape(), u.dtype())?, state])
    }
}

/// `G` and `N`, with `a`, `b` and `c` checked against them; `leading` are the axes before.
fn parameters(check: Check, given: &Given, leading: &[Axis]) -> Result<[i32; 2]> {
    let Given { u, a, b, c, .. } = given;
    let channels = u.dim(-1);
    check.floating("a", a)?;
    check.shape("a", a, axes![channels, "N"])?;
    let states = check.last_axis("a", a)?;
    let grouped = b.ndim() == leading.len() + 2;
    let trailing = if grouped { axes!["G", states] } else { axes![states] };
    check.dtype_among("b", b, &[u.dtype()])?;
    check.shape("b", b, &[leading, trailing].concat())?;
    check.dtype_among("c", c, &[u.dtype()])?;
    check.same_shape("c", c, b)?;
    let groups = if grouped { b.dim(-2) } else { 1 };
    let divides = groups > 0 && channels % groups == 0;
    check.value(divides, "groups of b", format_args!("divide D = {channels}"), groups)?;
    Ok([groups, states])
}

fn check_options(
    check: Check,
    given: &Given,
    sizes: &Sizes,
    name_of_state: &'static str,
) -> Result<()> {
    let SelectiveScanOptions { d, z, delta_bias, initial_state, .. } = given.options;
    let Sizes { channels, states, sequences, .. } = *sizes;
    for (name, by_channel) in [("d", d), ("delta_bias", delta_bias)] {
        if let Some(by_channel) = by_channel {
            check.floating(name, by_channel)?;
            check.shape(name, by_channel, axes![channels])?;
        }
    }
    if let Some(z) = z {
        check.same_shape("z", z, given.u)?;
        check.dtype_among("z", z, &[given.u.dtype()])?;
    }
    if let Some(state) = initial_state {
        check.dtype_among(name_of_state, state, &[Dtype::Float32])?;
        check.shape(name_of_state, state, axes![sequences, channels, states])?;
    }
    Ok(())
}

impl Dispatched for Problem {
    const OP: &'static str = "selective_scan";

    fn choose(&self, context: &Context) -> Backend {
        let kernel = self.sizes.length >= context.settings.min_seq_for_metal
            && context.kernel_wins(Self::OP, self.operands.u.size())
            && self.refusal(Backend::Kernel, context).is_none();
        if kernel { Backend::Kernel } else { Backend::Reference }
    }

    fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => Some("MLX has no selective scan"),
            Backend::Kernel => context.obstacle.or_else(|| kernel::refusal(self)),
            Backend::Reference => None,
        }
    }
}
