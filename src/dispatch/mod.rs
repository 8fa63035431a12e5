//! Which implementation of an operation runs, and why.
//!
//! An operation has up to three: MLX's own fast op ([`Backend::Builtin`]), a kernel of this crate
//! ([`Backend::Kernel`]) and plain MLX ops ([`Backend::Reference`]). A function with more than one
//! has a [`Dispatch`] in its options, if it has options: `Auto` chooses by device, shape and dtype,
//! and `Only` forces one, which is an error where that one cannot run. Functions without options,
//! such as [`silu`](crate::activation::silu), and modules choose as `Auto` does. Each choice is
//! traced under the target `mlx_primitives::dispatch`.

mod beside;
mod context;
mod measured;

pub(crate) use beside::{aside, beside};
pub use context::Context;

use crate::error::{Error, Result};
pub use crate::{backend::Backend, target::Target};

/// Who picks the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Dispatch {
    /// The operation chooses, by device, shape and dtype. Never fails for lack of a backend.
    #[default]
    Auto,
    /// This one runs, or the call returns [`Error::Unavailable`] with the reason.
    Only(Backend),
}

/// A checked call of one operation: enough to choose among its implementations.
pub(crate) trait Dispatched {
    /// The operation's public name.
    const OP: &'static str;

    /// The best backend here, never one that is refused. Pure: it reads the problem and the
    /// context, nothing else.
    fn choose(&self, context: &Context) -> Backend;

    /// Why `backend` cannot take this problem here, if it cannot.
    fn refusal(&self, backend: Backend, _: &Context) -> Option<&'static str> {
        (backend == Backend::Kernel).then_some(NO_KERNEL)
    }
}

impl Dispatch {
    /// The backend that will run `problem` on the current stream; one that is not refused.
    pub(crate) fn resolve<P: Dispatched>(self, problem: &P) -> Result<Backend> {
        self.resolve_in(problem, &Context::current()?)
    }

    fn resolve_in<P: Dispatched>(self, problem: &P, context: &Context) -> Result<Backend> {
        let backend = match self {
            Self::Auto => problem.choose(context),
            Self::Only(backend) => backend,
        };
        if let Some(reason) = problem.refusal(backend, context) {
            return Err(Error::Unavailable { op: P::OP, backend, reason: reason.to_owned() });
        }
        tracing::debug!(
            target: "mlx_primitives::dispatch",
            op = P::OP, %backend, device = ?context.target, forced = self != Self::Auto,
        );
        Ok(backend)
    }
}

/// The refusal of an operation that has no kernel of its own.
pub(crate) const NO_KERNEL: &str = "this operation has no kernel of its own";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    struct Fussy;

    impl Dispatched for Fussy {
        const OP: &'static str = "fussy";

        fn choose(&self, context: &Context) -> Backend {
            match context.target {
                Target::Cpu => Backend::Reference,
                Target::Metal | Target::Cuda => Backend::Builtin,
            }
        }
    }

    fn context(target: Target) -> Context {
        Context { target, obstacle: None, settings: Settings::default() }
    }

    #[test]
    fn auto_asks_the_problem() {
        let on = |target| Dispatch::Auto.resolve_in(&Fussy, &context(target)).ok();
        assert_eq!(on(Target::Cpu), Some(Backend::Reference));
        assert_eq!(on(Target::Metal), Some(Backend::Builtin));
    }

    #[test]
    fn a_forced_backend_is_taken_or_refused_with_a_reason() {
        let only = |backend| Dispatch::Only(backend).resolve_in(&Fussy, &context(Target::Cpu));
        assert_eq!(only(Backend::Builtin).ok(), Some(Backend::Builtin));
        assert_eq!(
            only(Backend::Kernel).err().map(|error| error.to_string()).as_deref(),
            Some("[fussy] backend kernel is unavailable: this operation has no kernel of its own")
        );
    }
}
