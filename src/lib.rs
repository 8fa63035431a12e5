#![doc = include_str!("../README.md")]
//!
//! # Dimension letters
//!
//! Every shape in these docs is written with the same letters:
//!
//! | letter | meaning |
//! |---|---|
//! | `B` | batch |
//! | `T` | tokens of all sequences of a step |
//! | `S`, `S_q`, `S_kv` | sequence length; of the queries; of the keys and values |
//! | `H`, `H_kv` | query heads; key and value heads |
//! | `D`, `D_v` | head size, or the size of the last axis where there are no heads; that of values |
//! | `dims` | the width of a model |
//! | `F` | hidden size of a feed-forward block |
//! | `I`, `O` | input and output features |
//! | `V` | vocabulary size |
//! | `G` | quantization group size; groups of a scan |
//! | `L` | length of a scanned sequence |
//! | `N` | size of the state of a channel; number of sequences, of rows of a batch |
//! | `P` | size of a head's input in `ssd_scan` |
//! | `M` | number of features of a feature map |
//! | `W` | taps of a short convolution; blocks in a row of a block table |
//! | `BLOCKS`, `BLOCK` | blocks of a pool; tokens of a block |
//! | `...` | any number of leading axes |

// Modules stand in dependency order: each may use those above it and none below.
mod backend;
pub mod error;
mod builder;
mod check;
pub mod layout;
mod sizes;
mod ffi;
mod target;
mod uploads;
pub mod config;
pub mod hardware;
pub mod kernel;
pub mod dispatch;

mod ids;
mod splitmix;
pub mod norm;
pub mod activation;
pub mod rope;
pub mod attention;
pub mod scan;
pub mod quant;
pub mod sampling;

pub mod layers;
pub mod ssm;

pub mod cache;
pub mod generation;

mod catalog;

pub use catalog::kernels;
pub use dispatch::{Backend, Dispatch};
pub use error::{Error, Result};
pub use layout::Layout;
