//! Writes text with a llama from a GGUF file.
#![expect(dead_code, reason = "the model that reads the weights and samples is not here yet")]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::print_stderr,
        reason = "a test fails by panicking and says what it skips"
    )
)]

mod args;
mod gguf;
mod report;
mod stream;
mod template;
#[cfg(test)]
mod testing;
mod tokenizer;

fn main() {}
