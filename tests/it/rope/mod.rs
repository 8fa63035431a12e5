mod function;
mod module;
pub(crate) mod oracle;
mod pair;
mod properties;
mod qk_norm_rope;
mod rope_qk;

const OP: &str = "rope";
