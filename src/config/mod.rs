//! Settings that a user may change without touching code, and the precision rule.

pub mod precision;
mod settings;

pub use settings::Settings;
