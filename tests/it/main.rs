//! Everything that evaluates arrays, in one binary because MLX links slowly.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stdout, reason = "a skipped backend is printed")]

mod support;

mod activation;
mod architecture;
mod attention;
mod benches;
mod cache;
mod generation;
mod hostile;
mod kernel;
mod layers;
mod norm;
mod quant;
mod rope;
mod sampling;
mod scan;
mod ssm;
mod tile;
