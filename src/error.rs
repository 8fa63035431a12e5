//! The crate's one error type.

use mlx_rs::{Dtype, error::Exception};

use crate::backend::Backend;

/// What the crate's fallible functions return; `Module::forward` returns mlx-rs's [`Exception`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation, a builder or a cache refused its input.
///
/// An error names the operation and the argument, what was expected and what was found, so that a
/// caller can match on these fields instead of parsing the message. `Module::forward` returns
/// mlx-rs's [`Exception`], which an error converts into; of the fields, only the message is left then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array has a rank or an axis the operation cannot take.
    #[error("[{op}] {argument} must have shape {expected} but got {found:?}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The shape asked for, with letters for free axes.
        expected: String,
        /// The shape seen.
        found: Vec<i32>,
    },

    /// An array has an element type the operation cannot take.
    #[error("[{op}] {argument} must have dtype {expected} but got {found:?}")]
    Dtype {
        /// The operation that refused.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The element types it takes.
        expected: String,
        /// The element type seen.
        found: Dtype,
    },

    /// A number, or a combination of arguments, is outside what the operation is defined for.
    #[error("[{op}] {argument} must {expected} but got {found}")]
    Value {
        /// The operation that refused.
        op: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What it must be or do.
        expected: String,
        /// The value seen.
        found: String,
    },

    /// The caller asked for one backend, and it cannot take this problem here.
    #[error("[{op}] backend {backend} is unavailable: {reason}")]
    Unavailable {
        /// The operation that refused.
        op: &'static str,
        /// The backend asked for.
        backend: Backend,
        /// Why it cannot be used.
        reason: String,
    },

    /// MLX itself failed; the message is its own.
    #[error(transparent)]
    Mlx(#[from] Exception),
}

impl From<Error> for Exception {
    #[track_caller]
    fn from(error: Error) -> Self {
        match error {
            Error::Mlx(exception) => exception,
            error => Self::custom(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_pass_through_both_ways() {
        let exception = Exception::from(Error::Mlx(Exception::custom("out of memory")));
        assert_eq!(exception.what(), "out of memory");
    }

    #[test]
    fn a_refusal_keeps_its_message_as_an_exception() {
        let error = Error::Shape {
            op: "flash_attention",
            argument: "keys",
            expected: "[B, S, H_kv, 64]".to_owned(),
            found: vec![2, 128, 8, 32],
        };
        let exception = Exception::from(error);
        assert_eq!(
            exception.what(),
            "[flash_attention] keys must have shape [B, S, H_kv, 64] but got [2, 128, 8, 32]"
        );
    }
}
