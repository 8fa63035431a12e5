//! The tokens of one step.

use mlx_rs::Array;

use super::{kv::CHECK, step::PagedStep};
use crate::{
    dispatch::{Backend, Dispatch},
    error::{Error, Result},
    rope::{RopeOptions, Turning, rope_qk},
};

/// The queries, keys and values of a step, a row for each token.
pub(super) struct Tokens<'a> {
    pub(super) queries: &'a Array,
    pub(super) keys: &'a Array,
    pub(super) values: &'a Array,
    /// How queries and keys are rotated first, if they are.
    pub(super) rope: Option<RopeOptions>,
}

impl Tokens<'_> {
    /// With queries and keys turned. By a kernel if they are to turn `alike`, whose angles are those of the one that writes
    /// tokens in place, unless another op was asked for.
    pub(super) fn turned(&self, step: &PagedStep, alike: bool) -> Result<[Array; 3]> {
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
    pub(super) fn turning(&self) -> Result<Option<Turning>> {
        let size = self.queries.dim(-1);
        self.rope.clone().map(|rope| Turning::new(CHECK, rope, size)).transpose()
    }

    /// Whether a kernel may turn them in passing, or has nothing to turn.
    pub(super) fn may_turn_in_passing(&self) -> bool {
        let asked = self.rope.as_ref().map(|rope| rope.dispatch);
        matches!(asked, None | Some(Dispatch::Auto | Dispatch::Only(Backend::Kernel)))
    }
}
