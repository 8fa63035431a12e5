//! What a text may be.

use std::{error, fmt};

use crate::sampling::TokenMask;

/// Why a constraint could not go on. Its text then ends as [`FinishReason::Failed`](super::FinishReason::Failed).
pub type ConstraintError = Box<dyn error::Error + Send + Sync>;

/// What may come next in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The tokens that may.
    pub tokens: TokenMask,
    /// Whether the text may also end here.
    pub end: bool,
}

/// A set of texts, and how far one of them has come: after each token, which may follow.
///
/// A [`GenerationRequest`](super::GenerationRequest) carries one as it is before any output. Each of its texts goes on
/// with a [`fork`](Self::fork) of its own, which it keeps while it waits. The tokens of the prompt are no part of it. Where
/// somebody guesses how texts go on, what may follow the guesses is asked of further forks.
///
/// It knows nothing of stop tokens: where the text may end, the engine allows those of the request and of
/// [`stop_tokens`](Self::stop_tokens), once it has `min_tokens`, and nowhere else, whatever `allowed` says of them. Tokens that
/// the request bans, or does not allow, are not drawn either. Where nothing is left but the end, the text ends as
/// [`FinishReason::Complete`](super::FinishReason::Complete); where not even that, it fails, and so it does where the
/// constraint returns an error or panics. Other texts go on.
///
/// # Example
/// Only even tokens, four of them:
/// ```
/// use mlx_primitives::{
///     generation::{Allowed, Constraint, ConstraintError},
///     sampling::TokenMask,
/// };
///
/// #[derive(Debug, Clone)]
/// struct FourEven(usize);
///
/// impl Constraint for FourEven {
///     fn vocabulary(&self) -> i32 {
///         10
///     }
///
///     fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
///         let mut tokens = TokenMask::none(10)?;
///         (0..10).step_by(2).for_each(|token| tokens.allow(token));
///         Ok(Allowed { tokens, end: false })
///     }
///
///     fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
///         self.0 += 1;
///         if token % 2 == 0 { Ok(()) } else { Err("an odd token".into()) }
///     }
///
///     fn is_complete(&self) -> bool {
///         self.0 == 4
///     }
///
///     fn fork(&self) -> Box<dyn Constraint> {
///         Box::new(self.clone())
///     }
/// }
/// ```
pub trait Constraint: fmt::Debug + Send + Sync {
    /// `V`: it knows the ids below it. A request is refused by an engine whose model has another.
    fn vocabulary(&self) -> i32;

    /// Further tokens that end a text, beside the request's stop tokens. Default: none.
    fn stop_tokens(&self) -> &[u32] {
        &[]
    }

    /// What may come next. It is asked before each token, unless the text [`is_complete`](Self::is_complete).
    ///
    /// # Errors
    /// When it cannot say.
    fn allowed(&mut self) -> Result<Allowed, ConstraintError>;

    /// Goes on by a token that was allowed.
    ///
    /// # Errors
    /// When it cannot.
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// Whether the text may end and nothing may follow, so that it ends without waiting for another step. It may say no:
    /// then [`allowed`](Self::allowed) says it.
    fn is_complete(&self) -> bool;

    /// Another that has come as far, and goes on by itself.
    fn fork(&self) -> Box<dyn Constraint>;
}
