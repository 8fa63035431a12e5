//! Kernels of these tests' own, run for real. Without clang-19 every test says so and passes, but not in CI.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests"
)]

mod bugs;
mod invalid;
mod kernels;
mod readme;
mod support;
