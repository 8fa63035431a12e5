//! Queries and keys of the same tokens.

use mlx_rs::Array;

use super::{
    RopeOffset, RopeOptions,
    turning::{Turning, check_offset},
};
use crate::{
    check::Check,
    dispatch::{Backend, Context, Target},
    error::Result,
    kernel::{MAX_ELEMENTS, refusal},
    uploads,
};

/// Both, checked, and how they turn.
pub(super) struct Pair<'a> {
    pub(super) queries: &'a Array,
    pub(super) keys: &'a Array,
    pub(super) offset: RopeOffset<'a>,
    pub(super) turning: Turning,
}

impl<'a> Pair<'a> {
    pub(super) fn new(
        check: Check,
        [queries, keys]: [&'a Array; 2],
        offset: RopeOffset<'a>,
        options: RopeOptions,
    ) -> Result<Self> {
        let layout = options.layout;
        let dtype = check.floating("queries", queries)?;
        check.shape("queries", queries, &layout.axes("B", "S", "H", "D"))?;
        let [batch, steps, _, size] = layout.dims(queries);
        check.dtype_among("keys", keys, &[dtype])?;
        check.shape("keys", keys, &layout.axes(batch, steps, "H_kv", size))?;
        let turning = Turning::new(check, options, size)?;
        check_offset(check, offset, batch)?;
        Ok(Self { queries, keys, offset, turning })
    }

    /// The first position of each row, `[B]`, int32.
    pub(super) fn starts(&self) -> Array {
        let batch = self.queries.dim(0);
        match self.offset {
            RopeOffset::At(first) => uploads::integers(vec![first; batch.unsigned_abs() as usize]),
            RopeOffset::PerRow(firsts) => firsts.clone(),
        }
    }

    /// The kernel on an NVIDIA GPU unless it refuses, else what [`rope`](super::rope()) would take.
    pub(super) fn choose(
        &self,
        op: &str,
        kernel_refusal: Option<&str>,
        context: &Context,
    ) -> Backend {
        let wins = context.kernel_wins(op, self.queries.size());
        match context.target {
            _ if wins && kernel_refusal.is_none() => Backend::Kernel,
            Target::Metal | Target::Cuda if self.builtin_refusal(context.target).is_none() => {
                Backend::Builtin
            }
            _ => Backend::Reference,
        }
    }

    pub(super) fn refusal(&self, backend: Backend, context: &Context) -> Option<&'static str> {
        match backend {
            Backend::Kernel => {
                context.obstacle.or_else(|| refusal([self.queries, self.keys])).or_else(|| {
                    self.is_too_large().then_some("a kernel takes no more than 2^31 elements")
                })
            }
            Backend::Builtin => self.builtin_refusal(context.target),
            Backend::Reference => None,
        }
    }

    fn is_too_large(&self) -> bool {
        self.queries.size() + self.keys.size() > MAX_ELEMENTS
    }

    fn builtin_refusal(&self, target: Target) -> Option<&'static str> {
        let mut both = [self.queries, self.keys].into_iter();
        both.find_map(|x| self.turning.builtin_refusal(x, self.offset, target))
    }
}
