//! A checked call.

use mlx_rs::{Array, Dtype, ops::zeros_dtype};

use super::{
    builtin,
    frame::Frame,
    gradient, kernel,
    options::{ScanOperator, ScanOptions},
    reference,
    rule::{Rule, wide},
};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Target},
    error::Result,
    kernel::stand_in,
    uploads,
};

/// What backends are given: the decay, which broadcasts to `[O, L, I]`; `x`, `[O, L, I]`; the states that segments begin
/// with, `[O, N, I]`, wide; and where they end, `[N + 1]`.
pub(super) type Inputs = [Array; 4];

/// What a scan does, apart from its arrays.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mode {
    pub(super) rule: Rule,
    pub(super) exclusive: bool,
    pub(super) reverse: bool,
    /// Whether the caller gave a state.
    pub(super) stateful: bool,
    pub(super) segmented: bool,
}

pub(super) struct Problem {
    pub(super) mode: Mode,
    pub(super) inputs: Inputs,
    frame: Frame,
}

impl Problem {
    pub(super) fn of_operator(
        check: Check,
        x: &Array,
        operator: ScanOperator,
        options: &ScanOptions,
    ) -> Result<Self> {
        check.floating("x", x)?;
        let frame = Frame::new(check, x, options)?;
        Self::new(
            check,
            frame,
            Rule::Operator(operator),
            [&stand_in(Dtype::Float32, 1), x],
            options,
        )
    }

    pub(super) fn affine(
        check: Check,
        a: &Array,
        x: &Array,
        options: &ScanOptions,
    ) -> Result<Self> {
        let dtypes = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Complex64];
        let of_each = [check.dtype_among("a", a, &dtypes)?, check.dtype_among("x", x, &dtypes)?];
        let complex = of_each.contains(&Dtype::Complex64);
        let frame = Frame::new(check, x, options)?;
        check.broadcasts_to("a", a, x.shape())?;
        let a = frame.folded_small(a)?;
        if !complex {
            return Self::new(check, frame, Rule::Affine, [&a, x], options);
        }
        let (a, x) = (a.as_dtype(Dtype::Complex64)?, x.as_dtype(Dtype::Complex64)?);
        Self::new(check, frame, Rule::Affine, [&a, &x], options)
    }

    fn new(
        check: Check,
        frame: Frame,
        rule: Rule,
        [decay, x]: [&Array; 2],
        options: &ScanOptions,
    ) -> Result<Self> {
        let wide = wide(x.dtype());
        if let Some(state) = options.initial_state {
            let dtypes = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Complex64];
            let taken = if wide == Dtype::Complex64 { 4 } else { 3 };
            check.dtype_among("initial_state", state, &dtypes[..taken])?;
            frame.check_state(check, state)?;
        }
        let mode = Mode {
            rule,
            exclusive: options.exclusive,
            reverse: options.reverse,
            stateful: options.initial_state.is_some(),
            segmented: options.segments.is_some(),
        };
        let state = frame.state(options.initial_state, rule.nothing(), wide)?;
        let bounds = match options.segments {
            Some(segments) => segments.to_vec(),
            None => vec![0, frame.length()],
        };
        let bounds = uploads::integers(bounds);
        let inputs = [decay.clone(), frame.folded(x)?, state, bounds];
        Ok(Self { mode, inputs, frame })
    }

    /// Of complex numbers MLX's own gradients are taken, whose conjugates are a convention of its own.
    fn is_real_affine(&self) -> bool {
        self.mode.rule == Rule::Affine && self.inputs[1].dtype() != Dtype::Complex64
    }

    fn is_empty(&self) -> bool {
        self.inputs[1].size() == 0
    }

    /// What kernels are measured as: MLX's own scans are faster along the last axis than along others.
    fn contest(&self) -> &'static str {
        match self.mode.rule {
            Rule::Affine => "affine_scan",
            Rule::Operator(_) if self.frame.inner() == 1 => "associative_scan along the last axis",
            Rule::Operator(_) => "associative_scan along another axis",
        }
    }

    pub(super) fn choose(&self, context: &Context) -> Backend {
        let long = self.frame.length() >= context.settings.min_seq_for_metal;
        let wins = long && context.kernel_wins(self.contest(), self.inputs[1].size());
        if wins && self.refusal(Backend::Kernel, context).is_none() {
            return Backend::Kernel;
        }
        match self.refusal_of_builtin(context.target) {
            Some(_) => Backend::Reference,
            None => Backend::Builtin,
        }
    }

    pub(super) fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Builtin => self.refusal_of_builtin(context.target),
            Backend::Kernel => {
                context.obstacle.or_else(|| kernel::refusal(&self.inputs, context.target))
            }
            Backend::Reference => None,
        }
    }

    fn refusal_of_builtin(&self, target: Target) -> Option<&'static str> {
        if self.mode.rule == Rule::Affine {
            return Some("MLX has no affine scan");
        }
        if self.mode.segmented {
            return Some("MLX's scans know no segments");
        }
        let x = &self.inputs[1];
        let columns_of_several = x.dim(0) > 1 && x.dim(2) > 1;
        (target == Target::Cuda && columns_of_several).then_some(
            "MLX's CUDA scans along another axis than the last are wrong for several of them",
        )
    }

    pub(super) fn run(&self, backend: Backend) -> Result<(Array, Array)> {
        let outputs = match backend {
            _ if self.is_empty() => self.nothing()?,
            Backend::Builtin => builtin::scan(self.mode, &self.inputs)?,
            Backend::Kernel => kernel::scan(self.mode, &self.inputs)?,
            Backend::Reference if self.is_real_affine() => {
                gradient::affine_scan(self.mode, &self.inputs)?
            }
            Backend::Reference => reference::scan(self.mode, &self.inputs)?,
        };
        self.frame.unfolded(outputs)
    }

    /// No element: the states go through.
    fn nothing(&self) -> Result<[Array; 2]> {
        let [_, x, state, _] = &self.inputs;
        Ok([zeros_dtype(x.shape(), x.dtype())?, state.clone()])
    }
}
